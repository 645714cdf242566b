"""Under the Transformers Trainer a run is what fit() makes of it; what would train otherwise is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import events, in_ranks
from problem import MOMENTUM, ROWS, Network, Poisoned, Rows, close, controller, fitted, flat
from torch import Tensor

from distgrow import LR, AtGrowth, Controller, Order, adascale, auto, budget, constant, constant_lr, ema, exponential
from distgrow.core.errors import ConfigError, Diverged
from distgrow.core.stages import Stages

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
from distgrow.integrations.transformers import GrowthTrainer  # noqa: E402

QUIET: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_grad_norm": 0.0}


def trainer(
    folder: Path, *, schedule: Controller | None = None, rows: Any = None, record: Any = None, **arguments: Any
) -> GrowthTrainer:
    """A Trainer of the problem with SGD; `rows` in place of its data."""
    args = transformers.TrainingArguments(output_dir=str(folder), **{**QUIET, **arguments})
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=MOMENTUM)
    return GrowthTrainer(
        model,
        args,
        controller=schedule or controller(),
        train_dataset=rows or Rows(),
        eval_dataset=Rows(),
        optimizers=(optimizer, None),
        record=record,
    )


def logged(run: GrowthTrainer, key: str) -> list[Any]:
    """What the Trainer has logged of a key."""
    return [line[key] for line in run.state.log_history if key in line]


def test_parameters_rates_and_ledger_are_those_of_fit(tmp_path: Path) -> None:
    parameters, progress, rates = fitted(tmp_path / "fit")
    run = trainer(tmp_path / "run", logging_steps=1, save_strategy="no")
    run.train()
    close(flat(run.model), parameters)
    assert run.session.progress.ledger == progress.ledger
    assert run.state.global_step == progress.step == len(rates)
    assert logged(run, "learning_rate") == rates
    assert run.state.epoch == 900 / 203


def test_resumed_from_the_trainers_checkpoint_it_ends_the_same_to_the_last_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "run", save_steps=45)  # in the middle of a stage and of a pass
    whole.train()
    resumed = trainer(tmp_path / "run", save_steps=45)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-45"))
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert resumed.session.progress.ledger == whole.session.progress.ledger
    assert resumed.state.global_step == whole.state.global_step
    finished = trainer(tmp_path / "run", save_steps=45)
    finished.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{whole.state.global_step}"))
    assert finished.state.global_step == whole.state.global_step
    assert torch.equal(flat(finished.model), flat(whole.model))


def test_what_happens_every_epoch_happens_every_pass_over_the_data(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", eval_strategy="epoch", save_strategy="no")
    run.train()
    evaluated = [line["epoch"] for line in run.state.log_history if "eval_loss" in line]
    assert [int(epoch) for epoch in evaluated] == [1, 2, 3, 4, 4]  # the last at the end of the budget


class Masked(Rows):
    """Most labels do not count."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "labels": torch.where(row["x"][:2] > 0.2, row["labels"], -100)}


class PerLabel(Network):
    """A row has two labels, and the loss is the mean over those that count."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        assert labels is not None
        logits = self.layers(x)[:, None].expand(-1, 2, -1)
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Dividing(PerLabel):
    """As a model of Transformers: it divides by the items that it is given."""

    def forward(self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **_: Any) -> Any:
        assert labels is not None
        logits = self.layers(x)[:, None].expand(-1, 2, -1).flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return {"loss": total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)}


class Deaf(PerLabel):
    """A model that takes any keyword and divides by nothing that it is given."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        return super().forward(x, labels)


class Partly(Dividing):
    """A model that adds something which it does not divide."""

    def forward(self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **_: Any) -> Any:
        return {"loss": super().forward(x, labels, num_items_in_batch)["loss"] + self.layers(x).square().mean()}


class Halved(Rows):
    """One of two labels of each row counts."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "labels": torch.stack([row["labels"], torch.tensor(-100)])}


def labels_that_count(batch: dict[str, Tensor]) -> int:
    return int(batch["labels"].ne(-100).sum())


def masked(folder: Path, model: type[Network], rows: Any, max_micro: int, **settings: Any) -> Tensor:
    """Parameters after some updates on rows with masked labels."""
    args = transformers.TrainingArguments(output_dir=str(folder), save_strategy="no", **QUIET)
    built = model(dropout=0.0)
    optimizers = (torch.optim.SGD(built.parameters(), lr=0.0), None)
    schedule = controller(growth=exponential(start=22, cap=44), max_micro=max_micro)
    GrowthTrainer(built, args, controller=schedule, train_dataset=rows, optimizers=optimizers, **settings).train()
    return flat(built)


def test_a_mean_over_labels_does_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    wanted = masked(tmp_path, PerLabel, Masked(), 64, items=labels_that_count)
    assert not torch.equal(wanted, masked(tmp_path, PerLabel, Masked(), 11, items=labels_that_count))
    for micro in (11, 2, 1):  # of one row there are micro-batches that count nothing
        close(masked(tmp_path, PerLabel, Masked(), micro, items=labels_that_count), wanted)
        close(masked(tmp_path, Dividing, Masked(), micro), wanted)  # by default, as the Trainer itself does it


def test_labels_that_do_not_count_are_refused_if_rows_have_unequal_numbers_of_them(tmp_path: Path) -> None:
    for model in (PerLabel, Deaf):
        with pytest.raises(ConfigError, match=r"rows have 0 to . labels other than -100.* give items="):
            masked(tmp_path, model, Masked(), 11)
        close(masked(tmp_path, model, Halved(), 11), masked(tmp_path, model, Halved(), 64))
    with pytest.raises(ConfigError, match="only a part of the loss is divided by num_items_in_batch"):
        masked(tmp_path, Partly, Masked(), 11)


class Unlabelled(Masked):
    """No row of the first update counts, nor any of the last ones of the pass."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        first = set(Order(n=ROWS)(list(range(22)))[1].tolist())
        return {**row, "labels": torch.full_like(row["labels"], -100)} if index in first else row


def test_an_update_that_counts_nothing_moves_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    end = masked(tmp_path, PerLabel, Unlabelled(), 11, items=labels_that_count)
    assert end.isfinite().all()
    close(masked(tmp_path, PerLabel, Unlabelled(), 3, items=labels_that_count), end)
    close(masked(tmp_path, Dividing, Unlabelled(), 3), end)
    with pytest.raises(ConfigError, match="items gave 0 for every row"):
        masked(tmp_path, PerLabel, Masked(), 11, items=lambda batch: 0)
    with pytest.raises(ConfigError, match="items gave -1"):
        masked(tmp_path, PerLabel, Masked(), 11, items=lambda batch: -1)


def test_the_seed_of_training_arguments_is_the_runs(tmp_path: Path) -> None:
    def end(schedule: Controller, **seeds: int) -> Tensor:
        run = trainer(tmp_path, schedule=schedule, save_strategy="no", **seeds)
        run.train()
        return flat(run.model)

    short: dict[str, Any] = {"budget": budget(samples=60)}
    plain, third = end(controller(**short)), end(controller(seed=3, **short))
    assert not torch.equal(plain, third)
    assert torch.equal(end(controller(**short), seed=3), third)
    assert torch.equal(end(controller(**short), data_seed=3), third)
    assert torch.equal(end(controller(seed=3, **short), seed=3, data_seed=3), third)
    for seeds in ({"seed": 4}, {"data_seed": 4}, {"seed": 3, "data_seed": 4}):
        with pytest.raises(ConfigError, match=r"seed=4 and the controller's seed=3 differ"):
            end(controller(seed=3, **short), **seeds)


def test_loader_processes_draw_the_same_rows(tmp_path: Path) -> None:
    run, other = trainer(tmp_path / "one", save_strategy="no"), trainer(tmp_path / "two", dataloader_num_workers=1)
    run.train()
    other.train()
    assert torch.equal(flat(run.model), flat(other.model))


@pytest.mark.parametrize("position", [100, 899])  # the last comes again in the update that replaces the skipped one
def test_updates_that_are_not_finite_are_skipped_counted_and_made_up_for(position: int, tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", rows=Poisoned(position), save_strategy="no")
    run.train()
    ledger = run.session.progress.ledger
    assert ledger.applied == 900
    assert ledger.skipped > 0
    assert flat(run.model).isfinite().all()


def test_too_many_of_them_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="20 updates in a row were not finite"):
        trainer(tmp_path / "run", rows=Poisoned(*range(ROWS)), save_strategy="no").train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps=4 is fixed for a run",
        ),
        ({"max_steps": 7}, "max_steps=7 would end the run elsewhere than .* budget; leave max_steps out"),
        ({"num_train_epochs": 2}, "num_train_epochs=2 would end the run elsewhere"),
        (
            {"lr_scheduler_type": "cosine"},
            "lr_scheduler_type=.*would fight the controller's lr; say it there",
        ),
        ({"warmup_steps": 5}, "warmup_steps=5 would fight the controller's lr"),
        ({"learning_rate": 0.3}, r"learning_rate=0.3, but the controller's lr.base is 0.05; leave learning_rate out"),
        ({"per_device_train_batch_size": 32}, "per_device_train_batch_size=32, but the controller's max_micro is 6"),
        (
            {"train_sampling_strategy": "sequential"},
            "train_sampling_strategy=sequential would order samples",
        ),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True would leave samples out"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True would train on smaller batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches hand out the batches of one rank"),
    ],
)
def test_arguments_that_decide_the_same_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **arguments)


def test_arguments_that_agree_are_taken(tmp_path: Path) -> None:
    trainer(tmp_path, learning_rate=0.05, per_device_train_batch_size=6)


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Rows that have no numbers."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(())


def test_data_and_schedules_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    for growth in (auto(start=5), adascale(5, scale=2)):  # of which the second would train with a gain of 1 throughout
        with pytest.raises(ConfigError, match=f"growth.kind={growth.name} goes by what distgrow's engines measure"):
            trainer(tmp_path, schedule=controller(growth=growth, stages=Stages(), lr=LR(base=0.1)))
    with pytest.raises(ConfigError, match="the training set is Stream, which has no rows by number"):
        trainer(tmp_path, rows=Stream())
    with pytest.raises(ConfigError, match="203 samples, but the controller was made for epoch=100"):
        trainer(tmp_path, schedule=controller(epoch=100))
    with pytest.raises(ConfigError, match="budget.tokens=900: another trainer does not count tokens"):
        trainer(tmp_path, schedule=controller(budget=budget(tokens=900, samples=90)))
    with pytest.raises(ConfigError, match="average is kept by distgrow's engines alone"):
        trainer(tmp_path, schedule=controller(average=ema(samples=50)))
    with pytest.raises(ConfigError, match="the controller's at_growth changes settings of the optimizer"):
        trainer(tmp_path, schedule=controller(at_growth=AtGrowth(moments="reset")))
    with pytest.raises(ConfigError, match="for world=3, but the trainer has 1 rank"):
        trainer(tmp_path, schedule=controller(world=3))
    args = transformers.TrainingArguments(output_dir=str(tmp_path), **QUIET)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(ConfigError, match="optimizers has a learning-rate scheduler"):
        GrowthTrainer(model, args, controller=controller(), train_dataset=Rows(), optimizers=(optimizer, scheduler))


def test_a_checkpoint_without_growth_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", save_steps=45)
    run.train()
    state = tmp_path / "run/checkpoint-45/trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "stateful_callbacks": {}}))
    with pytest.raises(ConfigError, match="the checkpoint was written without growth"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=str(state.parent))


@pytest.mark.slow
def test_two_ranks_come_to_the_parameters_of_fit(tmp_path: Path) -> None:
    in_ranks("../integrations/under_trainers.py", "transformers", str(tmp_path), workers=2)
    parameters, progress, _ = fitted(tmp_path / "fit", dropout=0.0)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    close(found["parameters"], parameters)
    assert found["applied"] == progress.ledger.applied
    losses = {folder: {e["step"]: e["loss"] for e in events(tmp_path / folder, "step")} for folder in ("record", "fit")}
    assert losses["record"] == pytest.approx(losses["fit"], rel=1e-9)


class Padded(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of 3 to 31 tokens, padded to 32."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(2, 50, (32,), generator=torch.Generator().manual_seed(index))
        there = torch.arange(32) < 3 + index * 7 % 29
        labels = torch.where(there, tokens, -100)
        return {"input_ids": tokens * there, "attention_mask": there.long(), "labels": labels}


def causal(folder: Path, max_micro: int | None) -> Tensor:
    """Parameters of a causal language model after three updates of 64 padded rows; None: of the plain Trainer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    common: dict[str, Any] = {
        "train_dataset": Padded(),
        "optimizers": (torch.optim.SGD(model.parameters(), lr=0.5), None),
    }
    settings: dict[str, Any] = {"output_dir": str(folder), "save_strategy": "no", "learning_rate": 0.5, **QUIET}
    if max_micro is None:
        fixed = {"max_steps": 3, "per_device_train_batch_size": 64, "lr_scheduler_type": "constant"}
        transformers.Trainer(model, transformers.TrainingArguments(**settings, **fixed), **common).train()
    else:
        schedule = Controller(
            growth=constant(64), lr=constant_lr(0.5), budget=budget(steps=3), epoch=64, max_micro=max_micro
        )
        args = transformers.TrainingArguments(**settings)
        GrowthTrainer(model, args, controller=schedule, **common).train()
    return flat(model)


def test_a_padded_causal_language_model_cut_to_pieces_is_that_of_the_plain_trainer(tmp_path: Path) -> None:
    plain = causal(tmp_path / "plain", None)
    for max_micro in (64, 8, 5):
        cut = causal(tmp_path / str(max_micro), max_micro)
        assert float((cut - plain).norm() / plain.norm()) < 1e-6
