"""Growth under Lightning: a callback that keeps the run, and a mixin that makes its updates."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.integrations.lightning_checks import check_trainer
from distgrow.integrations.lightning_loss import check_step_loss
from distgrow.integrations.session import GrowthSession, Positions, Rows, weighted
from distgrow.integrations.session_checks import check_groups, check_names, check_rate
from distgrow.optim.groups import assign_lr


class Growth(Callback):
    """Drive `Trainer(max_epochs=-1, callbacks=[Growth(controller, train_set)])` for a module that is Growing.

    A "batch" of Lightning's loop is a whole update. Progress and ledger are in Lightning's own checkpoints.
    """

    def __init__(self, controller: Controller, dataset: Any, **rows: Unpack[Rows]) -> None:
        """Keep the arguments of the GrowthSession, which is made when the trainer knows its ranks.

        Args:
            controller: Decides batches and learning rates.
            dataset: The training set, with rows by number.
            **rows: How its rows are loaded, collated and counted: see Rows.
        """
        check_names(rows, Rows)
        self._controller, self._dataset, self._rows = controller, dataset, rows
        self._session: GrowthSession | None = None

    @property
    def session(self) -> GrowthSession:
        """Return the run, once trainer.fit has begun."""
        assert self._session is not None, "trainer.fit has not begun"
        return self._session

    @property
    def course(self) -> GrowthSession:
        """Return `session`, by its former name."""
        return self.session

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would train otherwise than the controller says, then take the updates over."""
        if stage != "fit":
            return
        check_module(pl_module)
        check_trainer(trainer)
        world = World(rank=trainer.global_rank, size=trainer.world_size, device=trainer.strategy.root_device)
        self._session = GrowthSession(self._controller, self._dataset, world=world, **self._rows)
        assert isinstance(pl_module, Growing)
        pl_module.growth = self
        pl_module.automatic_optimization = False  # from here on: Lightning allows clipping to be set only before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check optimizer and loader, which are known now that a checkpoint has been loaded."""
        if trainer.train_dataloader is not self.session:
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
        if self.session.progress.samples == 0:
            check_rate(groups, self._controller.lr.initial)
            controller = self.session.controller
            self.session.world.on_rank0(lambda: check_step_loss(pl_module, self._dataset, controller, self._rows))
        trainer.should_stop = self.session.done
        self._show_last_epoch(trainer, trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the last update."""
        trainer.should_stop = trainer.should_stop or self.session.done

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell progress bars how many epochs there are."""
        self._show_last_epoch(trainer, trainer.current_epoch + 1)

    def _show_last_epoch(self, trainer: Any, coming: int) -> None:
        """Set the trainer's last epoch, which it shows; it stays ahead of the coming one until the budget is used up.

        Skipped updates make an epoch longer than a pass, so the number may rise.
        """
        if not trainer.fast_dev_run:
            left = self.session.last_epoch() - int(self.session.epoch)
            trainer.fit_loop.max_epochs = coming + max(1, left)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics that the module has logged."""
        if self._session is not None and not trainer.sanity_checking:
            self._session.evaluated(trainer.callback_metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw no more rows."""
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw no more rows."""
        self._end(trainer)

    def _end(self, trainer: Any) -> None:
        if not trainer.fast_dev_run:
            trainer.fit_loop.max_epochs = -1
        if self._session is not None:
            self._session.close()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was written without this callback."""
        if self.state_key not in checkpoint["callbacks"]:
            raise ConfigError("the checkpoint was written without Growth: it does not say where the data order was")

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's checkpoints hold of the run."""
        return self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.session.load_state_dict(state_dict)


class Growing:
    """Makes the updates of a finished module on whose left it stands: `class GrowingNet(Growing, Net)`.

    Net's own training_step is called for each micro-batch and returns the mean loss over its rows. Net's
    configure_optimizers, optimizer_step, clipping and hooks are used as they are.
    """

    growth: Growth

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.training_step is Growing.training_step:
            return
        if "training_step" in vars(cls):
            raise ConfigError(
                f"{cls.__name__} has a training_step of its own, which would replace Growing's; write it in a class "
                f"without Growing, and train class Growing{cls.__name__}(Growing, {cls.__name__}) with an empty body"
            )
        raise ConfigError(f"{cls.__name__} has a training_step before Growing's; put Growing left of the module")

    def train_dataloader(self) -> Any:
        """Return the session: one item an update, which does not hold the rows yet."""
        trainer: Any = self._module().trainer
        if getattr(self, "growth", None) not in trainer.callbacks:
            raise ConfigError(
                f"{type(self).__name__} leaves its updates to Growth; give the Trainer callbacks=[Growth(…)]"
            )
        return self.growth.session

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        """Call a batch-transfer hook, of the module or its data module, on real rows alone."""
        if isinstance(args[0], Positions):
            return args[0]
        return super()._call_batch_hook(hook_name, *args)  # pyright: ignore[reportAttributeAccessIssue]

    def step_loss(self, batch_idx: int) -> Callable[[Any], Any]:
        """Return the function of collated rows that gives the loss of the module's own training_step."""
        module = self._module()
        step = super().training_step  # pyright: ignore[reportAttributeAccessIssue]
        extra = [batch_idx] if len(inspect.signature(step).parameters) > 1 else []
        return lambda rows: _loss(step(_placed(rows, module.trainer, module), *extra))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Make one whole update, and return this rank's part of the loss.

        It is forward and backward of all micro-batches, clipping and the step.
        """
        module, session = self._module(), self.growth.session
        trainer, optimizer = module.trainer, module.optimizers()
        assert not isinstance(optimizer, list)
        loss_of, plan = self.step_loss(batch_idx), session.begin(module)
        losses: list[Tensor] = []
        for micro_batch, weight, last in session.draw(plan):
            with nullcontext() if last else _unsynced(trainer):
                loss = weighted(loss_of(micro_batch), weight)
                module.manual_backward(loss)
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        if session.end(plan, module.parameters(), loss):
            clip, how = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            module.configure_gradient_clipping(optimizer.optimizer, clip, how)
            assign_lr(optimizer.param_groups, plan.lr)
            step_once(module, batch_idx, optimizer, loss)
        optimizer.zero_grad()
        shown = {name: float(value) for name, value in {**session.shown(plan), "lr": plan.lr}.items()}
        module.log_dict(shown, on_step=True, on_epoch=False, prog_bar=True)
        return {"loss": loss}

    def _module(self) -> LightningModule:
        assert isinstance(self, LightningModule), "Growing belongs left of a LightningModule in the list of bases"
        return self


def step_once(module: LightningModule, batch_idx: int, optimizer: Any, loss: Tensor) -> None:
    """Call the module's own optimizer_step for gradients that are there already.

    Raises:
        ConfigError: It makes another number of steps than one, or sets a learning rate.
    """
    rates, steps = _rates(optimizer), 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    counting = optimizer.optimizer.register_step_post_hook(count)
    try:
        module.optimizer_step(module.current_epoch, batch_idx, optimizer, lambda: loss)
    finally:
        counting.remove()
    name = type(module).__name__
    if steps != 1:
        raise ConfigError(
            f"{name}.optimizer_step made {steps} steps for one update, while the controller counts one; "
            "call super().optimizer_step(…) or optimizer.step(closure=…) once"
        )
    if _rates(optimizer) != rates:
        raise ConfigError(
            f"{name}.optimizer_step sets the learning rate, which would fight the controller's lr; say a warm-up there "
            "as lr.decay, and a group's factor as its lr_scale"
        )


def _rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _placed(batch: Any, trainer: Trainer, module: LightningModule) -> Any:
    """Return the rows as Lightning would hand them to training_step."""
    strategy = trainer.strategy
    batch = module._on_before_batch_transfer(strategy.precision_plugin.convert_input(batch), dataloader_idx=0)
    return strategy.batch_to_device(batch, dataloader_idx=0)


def _unsynced(trainer: Trainer) -> AbstractContextManager[Any]:
    """Keep gradients on their rank within the context."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()


def _loss(output: Any) -> Any:
    return output["loss"] if isinstance(output, Mapping) else output


def check_module(module: LightningModule) -> None:
    """Raise ConfigError if Growth cannot make a module's updates."""
    name = type(module).__name__
    if not isinstance(module, Growing):
        raise ConfigError(
            f"{name} makes its updates batch by batch: Lightning divides losses by a fixed accumulate_grad_batches and "
            f"loses its phase when that changes; train class Growing{name}(Growing, {name}) instead"
        )
    if not module.automatic_optimization and not hasattr(module, "growth"):
        raise ConfigError(f"{name} sets automatic_optimization=False and steps by itself; leave the updates to Growth")
