"""Under Lightning a run is what fit() makes of it; what would train otherwise is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import events, in_ranks
from problem import MOMENTUM, ROWS, Network, Poisoned, Rows, close, controller, fitted, flat
from torch import Tensor

from distgrow import LR, Controller, adascale, auto
from distgrow.core.errors import ConfigError
from distgrow.core.stages import Stages
from distgrow.data.spec import Loading

lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra 'lightning'")
from distgrow.integrations.lightning import Growing, Growth  # noqa: E402

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": -1,
}


class Net(lightning.LightningModule):
    """The problem as anybody would write it."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.network = Network(dropout)
        self.rates: list[float] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.network(**batch)["loss"]
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.validated.append(self.current_epoch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0, momentum=MOMENTUM)


class GrowingNet(Growing, Net):
    """The same, growing."""


def run(
    module: Any = None,
    *,
    schedule: Controller | None = None,
    rows: Any = None,
    fit: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[Any, Growth, Any]:
    """Trainer, growth and module after trainer.fit."""
    module, growth = module or GrowingNet(), Growth(schedule or controller(), rows or Rows())
    callbacks = [growth, *arguments.pop("callbacks", [])]
    trainer = lightning.Trainer(**{**QUIET, **arguments}, callbacks=callbacks)
    trainer.fit(module, **(fit or {}))
    return trainer, growth, module


def test_a_misspelt_keyword_is_refused_at_once() -> None:
    misspelt: dict[str, Any] = {"colate": list}
    with pytest.raises(TypeError, match=r"'colate'.*collate"):
        Growth(controller(), Rows(), **misspelt)


def test_parameters_rates_and_ledger_are_those_of_fit(tmp_path: Path) -> None:
    parameters, progress, rates = fitted(tmp_path / "fit")
    trainer, growth, module = run()
    close(flat(module), parameters)
    assert growth.session.progress.ledger == progress.ledger
    assert growth.course is growth.session  # its former name
    assert trainer.global_step == progress.step
    assert module.rates == rates
    assert trainer.current_epoch == 5  # four passes over the data and a part


def test_resumed_from_lightnings_checkpoint_it_ends_the_same_to_the_last_bit(tmp_path: Path) -> None:
    keep = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=15, save_top_k=-1)
    whole, growth, module = run(enable_checkpointing=True, callbacks=[keep])
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 4
    for checkpoint in checkpoints:
        trainer, again, resumed = run(fit={"ckpt_path": checkpoint, "weights_only": True})
        assert torch.equal(flat(resumed), flat(module)), checkpoint
        assert again.session.progress.ledger == growth.session.progress.ledger
        assert trainer.global_step == whole.global_step
        assert trainer.current_epoch == whole.current_epoch


@pytest.mark.parametrize("position", [100, 899])
def test_updates_that_are_not_finite_are_skipped_counted_and_made_up_for(position: int) -> None:
    _, growth, module = run(rows=Poisoned(position))
    ledger = growth.session.progress.ledger
    assert ledger.applied == 900
    assert ledger.skipped > 0
    assert flat(module).isfinite().all()


def test_an_epoch_is_a_pass_over_the_data() -> None:
    rows = torch.utils.data.DataLoader(Rows(), batch_size=ROWS)
    *_, module = run(fit={"val_dataloaders": rows})
    assert module.validated == [0, 1, 2, 3, 4]


def test_clipping_is_the_trainers_own() -> None:
    *_, module = run()
    *_, clipped = run(gradient_clip_val=0.05)
    assert not torch.equal(flat(module), flat(clipped))


@pytest.mark.slow
def test_loader_processes_draw_the_same_rows() -> None:
    *_, module = run()
    growth, other = Growth(controller(), Rows(), loading=Loading(workers=1)), GrowingNet()
    lightning.Trainer(**QUIET, callbacks=[growth]).fit(other)
    assert torch.equal(flat(module), flat(other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate_grad_batches": 4}, r"accumulate_grad_batches=4\) .* the controller accumulates"),
        ({"max_epochs": 3}, r"max_epochs=3, max_steps=-1\) would end the run elsewhere"),
        ({"max_steps": 3}, "max_steps=3"),
        ({"limit_train_batches": 3}, "would leave samples out"),
        ({"precision": "16-true"}, "precision='16-true'"),
    ],
)
def test_a_trainer_that_decides_the_same_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**arguments)


def test_an_accumulation_scheduler_is_refused() -> None:
    scheduler = lightning.callbacks.GradientAccumulationScheduler({2: 2})
    with pytest.raises(ConfigError, match="GradientAccumulationScheduler"):
        run(callbacks=[scheduler])


class Scheduled(GrowingNet):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]


class ManyRates(GrowingNet):
    def configure_optimizers(self) -> Any:
        first, *rest = self.parameters()
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.2}])


class OwnRate(GrowingNet):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class GrowingManual(Growing, Manual):
    pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Net, r"train class GrowingNet\(Growing, Net\) instead"),
        (Scheduled, "a learning-rate scheduler, which would fight the controller's lr"),
        (ManyRates, "have the learning rates"),
        (OwnRate, r"the optimizer has lr=0.001, but the controller's lr.base is \S+, which would replace it"),
        (GrowingManual, "automatic_optimization=False"),
    ],
)
def test_a_module_that_decides_the_same_is_refused(module: type[Net], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(module())


class Averaged(Net):
    """A moving average of the parameters in the module's own optimizer_step, as Lightning advises."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.network, avg_fn=lambda old, new, _: 0.9 * old + 0.1 * new
        )

    def optimizer_step(self, *words: Any, **options: Any) -> None:
        super().optimizer_step(*words, **options)
        self.average.update_parameters(self.network)


class GrowingAveraged(Growing, Averaged):
    """The same, growing."""


class ByHand(lightning.Callback):
    """The same average, from the parameters after every update."""

    def __init__(self) -> None:
        self.average: Tensor | None = None
        self.ends: list[int] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.ends.append(trainer.max_epochs - 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = flat(pl_module.network)
        self.average = now if self.average is None else 0.9 * self.average + 0.1 * now


def test_the_modules_own_optimizer_step_is_called_at_every_update() -> None:
    by_hand = ByHand()
    trainer, growth, module = run(GrowingAveraged(), callbacks=[by_hand])
    assert int(module.average.n_averaged) == growth.session.progress.step == trainer.global_step
    assert by_hand.average is not None
    close(flat(module.average.module), by_hand.average)
    _, growth, module = run(GrowingAveraged(), rows=Poisoned(100))
    assert growth.session.progress.ledger.skipped > 0
    assert int(module.average.n_averaged) == growth.session.progress.step


def test_progress_bars_show_the_last_pass_over_the_data() -> None:
    by_hand = ByHand()
    trainer, *_ = run(callbacks=[by_hand])
    assert by_hand.ends == [4, 4, 4, 4, 4]  # 900 samples of 203: passes 0 to 4
    assert trainer.max_epochs == -1


class Warming(Net):
    def optimizer_step(self, *words: Any, **options: Any) -> None:
        super().optimizer_step(*words, **options)
        for group in self.optimizers().param_groups:
            group["lr"] = 0.01


class Idle(Net):
    def optimizer_step(self, *words: Any, **options: Any) -> None:
        pass


class Twice(Net):
    def optimizer_step(self, *words: Any, **options: Any) -> None:
        super().optimizer_step(*words, **options)
        super().optimizer_step(*words, **options)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Warming, "optimizer_step sets the learning rate, which would fight the controller's lr"),
        (Idle, "optimizer_step made 0 steps for one update"),
        (Twice, "optimizer_step made 2 steps for one update"),
    ],
)
def test_an_optimizer_step_that_decides_the_same_is_refused(module: type[Net], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(type("GrowingOne", (Growing, module), {})())


class HookedNet(Net):
    """Hooks that see every batch on its way."""

    seen: list[int]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(len(batch["labels"]))
        return {**batch, "x": 2 * batch["x"]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "x": batch["x"] / 2}


def test_batch_hooks_get_the_rows_of_each_micro_batch() -> None:
    *_, plain = run()
    hooked: Any = type("GrowingHooked", (Growing, HookedNet), {})()
    hooked.seen = []
    *_, module = run(hooked)
    assert (sum(hooked.seen), max(hooked.seen)) == (900, 6)
    assert torch.equal(flat(module), flat(plain))


def test_a_training_step_beside_growing_is_refused_with_the_way_out() -> None:
    body = {"training_step": Net.training_step}
    with pytest.raises(ConfigError, match=r"Own has a training_step of its own.* class GrowingOwn\(Growing, Own\)"):
        type("Own", (Growing, lightning.LightningModule), body)


def test_growing_right_of_the_module_is_refused_where_the_class_is_written() -> None:
    with pytest.raises(ConfigError, match="WrongWay has a training_step before Growing's"):
        type("WrongWay", (Net, Growing), {})


def test_a_growing_module_without_growth_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"GrowingNet leaves its updates to Growth; give the Trainer callbacks="):
        lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit(GrowingNet())


def test_data_and_schedules_that_cannot_be_followed_are_refused() -> None:
    rows = torch.utils.data.DataLoader(Rows(), batch_size=8, shuffle=True)
    with pytest.raises(ConfigError, match="trainer.fit was given training data"):
        run(fit={"train_dataloaders": rows})
    for growth in (auto(start=5), adascale(5, scale=2)):
        with pytest.raises(ConfigError, match=f"growth.kind={growth.name} goes by what distgrow's engines measure"):
            run(schedule=controller(growth=growth, stages=Stages(), lr=LR(base=0.1)))


def test_a_checkpoint_without_growth_is_refused(tmp_path: Path) -> None:
    plain = lightning.Trainer(**{**QUIET, "max_epochs": 1})
    plain.fit(Net(), torch.utils.data.DataLoader(Rows(), batch_size=8))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ConfigError, match="the checkpoint was written without Growth"):
        run(fit={"ckpt_path": tmp_path / "plain.ckpt", "weights_only": True})


@pytest.mark.slow
def test_two_ranks_come_to_the_parameters_of_fit(tmp_path: Path) -> None:
    in_ranks("../integrations/under_trainers.py", "lightning", str(tmp_path), workers=2)
    parameters, progress, _ = fitted(tmp_path / "fit", dropout=0.0)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    close(found["parameters"], parameters)
    assert found["applied"] == progress.ledger.applied
    losses = {folder: {e["step"]: e["loss"] for e in events(tmp_path / folder, "step")} for folder in ("record", "fit")}
    assert losses["record"] == pytest.approx(losses["fit"], rel=1e-9)
