"""Under the Transformers Trainer a run is what fit() makes of it; what would train otherwise is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_ranks
from problem import MOMENTUM, ROWS, Network, Poisoned, Rows, close, controller, fitted, flat
from torch import Tensor

from distgrow import Controller, auto, exponential
from distgrow.core.errors import ConfigError, Diverged
from distgrow.core.stages import Stages

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
from distgrow.integrations.transformers import GrowthTrainer  # noqa: E402

QUIET: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_grad_norm": 0.0}


def trainer(folder: Path, *, schedule: Controller | None = None, rows: Any = None, **arguments: Any) -> GrowthTrainer:
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
    )


def logged(run: GrowthTrainer, key: str) -> list[Any]:
    """What the Trainer has logged of a key."""
    return [line[key] for line in run.state.log_history if key in line]


def test_parameters_rates_and_ledger_are_those_of_fit(tmp_path: Path) -> None:
    parameters, progress, rates = fitted(tmp_path / "fit")
    run = trainer(tmp_path / "run", logging_steps=1, save_strategy="no")
    run.train()
    close(flat(run.model), parameters)
    assert run.course.progress.ledger == progress.ledger
    assert run.state.global_step == progress.step == len(rates)
    assert logged(run, "learning_rate") == rates
    assert run.state.epoch == 900 / 203


def test_resumed_from_the_trainers_checkpoint_it_ends_the_same_to_the_last_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "run", save_steps=45)  # in the middle of a stage and of a pass
    whole.train()
    resumed = trainer(tmp_path / "run", save_steps=45)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-45"))
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert resumed.course.progress.ledger == whole.course.progress.ledger
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


def labels_that_count(batch: dict[str, Tensor]) -> int:
    return int(batch["labels"].ne(-100).sum())


def test_a_mean_over_what_is_counted_does_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    ends = []
    args = transformers.TrainingArguments(output_dir=str(tmp_path), save_strategy="no", **QUIET)
    for rows in (11, 64):
        model = PerLabel(dropout=0.0)
        optimizers = (torch.optim.SGD(model.parameters(), lr=0.0), None)
        schedule = controller(growth=exponential(start=22, cap=44), max_micro=rows)
        settings: dict[str, Any] = {"controller": schedule, "train_dataset": Masked(), "optimizers": optimizers}
        GrowthTrainer(model, args, items=labels_that_count, **settings).train()
        ends.append(flat(model))
    assert not torch.equal(*ends)
    close(*ends)


def test_loader_processes_draw_the_same_rows(tmp_path: Path) -> None:
    run, other = trainer(tmp_path / "one", save_strategy="no"), trainer(tmp_path / "two", dataloader_num_workers=1)
    run.train()
    other.train()
    assert torch.equal(flat(run.model), flat(other.model))


@pytest.mark.parametrize("position", [100, 899])  # the last comes again in the update that replaces the skipped one
def test_updates_that_are_not_finite_are_skipped_counted_and_made_up_for(position: int, tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", rows=Poisoned(position), save_strategy="no")
    run.train()
    ledger = run.course.progress.ledger
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
    with pytest.raises(ConfigError, match="growth.kind=auto goes by what distgrow's engines measure"):
        trainer(tmp_path, schedule=controller(growth=auto(start=5), stages=Stages()))
    with pytest.raises(ConfigError, match="the training set is Stream, which has no rows by number"):
        trainer(tmp_path, rows=Stream())
    with pytest.raises(ConfigError, match="203 samples, but the controller was made for epoch=100"):
        trainer(tmp_path, schedule=controller(epoch=100))
    with pytest.raises(ConfigError, match="for world=3, but the trainer has 1 ranks"):
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
