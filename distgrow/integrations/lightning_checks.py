"""What a Lightning Trainer must leave to the controller; all of it is refused before the first update."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from distgrow.core.errors import ConfigError


def check_trainer(trainer: Trainer) -> None:
    """Raise ConfigError with all that a Trainer does otherwise than the controller says, one a line."""
    found = list(_problems(trainer))
    if found:
        raise ConfigError("\n".join(found))


def _problems(trainer: Any) -> Iterator[str]:
    accumulates = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
    if trainer.accumulate_grad_batches != 1 or accumulates:
        yield (
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and GradientAccumulationScheduler "
            "would accumulate whole updates; the controller accumulates: leave them out, set its max_micro"
        )
    if not trainer.fast_dev_run and (trainer.max_epochs != -1 or trainer.max_steps != -1):
        yield (
            f"Trainer(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}) would end the run elsewhere than "
            "the controller's budget; give max_epochs=-1 and leave max_steps out"
        )
    if not trainer.fast_dev_run and (trainer.limit_train_batches != 1.0 or trainer.overfit_batches):
        yield "Trainer(limit_train_batches=…, overfit_batches=…) would leave samples out; leave them out"
    if trainer.precision in ("16-mixed", "16-true", "16", 16):
        yield f"Trainer(precision={trainer.precision!r}) scales losses and skips steps by itself; use bf16-mixed"
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or type(strategy).__name__.startswith("XLA"):
        yield (
            f"Trainer(strategy=…) is {type(strategy).__name__}: with sharded gradients an update that is not finite "
            "cannot be told on every rank; use one device or ddp, or distgrow's engine.kind=deepspeed"
        )
    elif isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        yield "DDPStrategy(static_graph=True) does not go with micro-batches that are not reduced; leave it out"
