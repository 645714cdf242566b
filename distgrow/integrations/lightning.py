"""Growth under Lightning: a callback that keeps the run and a mixin that makes its updates; decides nothing itself."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from distgrow.core.errors import ConfigError
from distgrow.data.spec import Loading
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.integrations.session import GrowthSession, check_groups, check_rate, weighted
from distgrow.optim.groups import assign_lr


class Growth(Callback):
    """Drives `Trainer(max_epochs=-1, callbacks=[Growth(controller, train_set)])` for a module that is Growing.

    One "batch" of Lightning's loop is a whole update, one of its epochs a pass over the data. Progress and ledger are
    in Lightning's own checkpoints. `items(batch)` counts what the module's loss is a mean over, by default rows;
    `loading` is how rows are loaded, by default in the training process.
    """

    def __init__(
        self,
        controller: Controller,
        dataset: Any,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        items: Callable[[Any], int] | None = None,
        loading: Loading | None = None,
    ) -> None:
        self._controller, self._dataset = controller, dataset
        self._rows: dict[str, Any] = {"collate": collate, "items": items, "loading": loading}
        self._course: GrowthSession | None = None

    @property
    def course(self) -> GrowthSession:
        """Where the run is; there once fit() has begun."""
        assert self._course is not None, "trainer.fit has not begun"
        return self._course

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would train otherwise than the controller says; then take the updates over."""
        if stage != "fit":
            return
        check_module(pl_module)
        check_trainer(trainer)
        world = World(rank=trainer.global_rank, size=trainer.world_size, device=trainer.strategy.root_device)
        self._course = GrowthSession(self._controller, self._dataset, world=world, **self._rows)
        assert isinstance(pl_module, Growing)
        pl_module.growth = self
        pl_module.automatic_optimization = False  # from here on: Lightning allows clipping to be set only before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizer, loader and checkpoint are known now."""
        if trainer.train_dataloader is not self.course:
            raise ConfigError(
                "trainer.fit was given training data, whose order and batches would not be the controller's: "
                "give the data set to Growth, and only validation data to fit"
            )
        if trainer.lr_scheduler_configs:
            raise ConfigError(
                "configure_optimizers returns a learning-rate scheduler, which would fight the controller's lr; "
                "return the optimizer alone"
            )
        if len(trainer.optimizers) != 1:
            raise ConfigError(f"configure_optimizers returns {len(trainer.optimizers)} optimizers; growth needs one")
        groups = trainer.optimizers[0].param_groups
        check_groups(groups)
        if self.course.progress.samples == 0:
            check_rate(groups, self._controller.lr.base)
        trainer.should_stop = self.course.done

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An update has been made."""
        trainer.should_stop = trainer.should_stop or self.course.done

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No more rows are drawn."""
        self.course.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """No more rows are drawn."""
        if self._course is not None:
            self._course.close()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse one that was written without it."""
        if self.state_key not in checkpoint["callbacks"]:
            raise ConfigError("the checkpoint was written without Growth: it does not say where the data order was")

    def state_dict(self) -> dict[str, Any]:
        """What Lightning's checkpoints hold of it."""
        return self.course.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.course.load_state_dict(state_dict)


class Growing:
    """Put it left of a finished module, `class GrowingNet(Growing, Net)`: Growth then makes its updates.

    Net's own training_step is called for each micro-batch and gives the mean loss over its rows; Net's
    configure_optimizers, clipping and hooks are used as they are.
    """

    growth: Growth

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.training_step is not Growing.training_step:
            raise ConfigError(f"{cls.__name__} has a training_step before Growing's; put Growing left of the module")

    def train_dataloader(self) -> Any:
        """The course: one item an update, which does not hold the rows yet."""
        trainer: Any = self._module().trainer
        if getattr(self, "growth", None) not in trainer.callbacks:
            raise ConfigError(
                f"{type(self).__name__} leaves its updates to Growth; give the Trainer callbacks=[Growth(…)]"
            )
        return self.growth.course

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One update, whole: forward and backward of all micro-batches, clip, step; this rank's part of the loss."""
        module, course = self._module(), self.growth.course
        trainer, optimizer = module.trainer, module.optimizers()
        assert not isinstance(optimizer, list)
        step = super().training_step  # pyright: ignore[reportAttributeAccessIssue]
        extra = [batch_idx] if len(inspect.signature(step).parameters) > 1 else []
        plan = course.begin(module)
        losses: list[Tensor] = []
        for micro_batch, weight, last in course.draw(plan):
            with nullcontext() if last else _unsynced(trainer):
                loss = weighted(_loss(step(_placed(micro_batch, trainer, module), *extra)), weight)
                module.manual_backward(loss)
            losses.append(loss.detach())
        course.end(plan, module.parameters())
        clip, how = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        module.configure_gradient_clipping(optimizer.optimizer, clip, how)
        assign_lr(optimizer.param_groups, plan.lr)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": torch.stack(losses).sum()}

    def _module(self) -> LightningModule:
        assert isinstance(self, LightningModule), "Growing belongs left of a LightningModule in the list of bases"
        return self


def _placed(batch: Any, trainer: Trainer, module: LightningModule) -> Any:
    """The rows as Lightning would hand them over."""
    strategy = trainer.strategy
    batch = module._on_before_batch_transfer(strategy.precision_plugin.convert_input(batch), dataloader_idx=0)
    return strategy.batch_to_device(batch, dataloader_idx=0)


def _unsynced(trainer: Trainer) -> AbstractContextManager[Any]:
    """Gradients stay on their rank meanwhile."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()


def _loss(output: Any) -> Any:
    return output["loss"] if isinstance(output, Mapping) else output


def check_module(module: LightningModule) -> None:
    """ConfigError where Growth cannot make a module's updates."""
    name = type(module).__name__
    if not isinstance(module, Growing):
        raise ConfigError(
            f"{name} makes its updates batch by batch: Lightning divides losses by a fixed accumulate_grad_batches and "
            f"loses its phase when that changes; train class Growing{name}(Growing, {name}) instead"
        )
    if not module.automatic_optimization and not hasattr(module, "growth"):
        raise ConfigError(f"{name} sets automatic_optimization=False and steps by itself; leave the updates to Growth")


def check_trainer(trainer: Trainer) -> None:
    """ConfigError with all that a Trainer does otherwise than the controller says, one a line."""
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
