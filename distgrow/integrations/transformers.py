"""Growth under the Transformers Trainer: a mixin, its Trainer and their callback; decides nothing about batch or LR."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.data.dataset import check_rows_by_number
from distgrow.data.spec import Loading
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.integrations.session import GrowthSession, check_groups, weighted
from distgrow.optim.groups import assign_lr


class Growing:
    """Put it left of a Trainer, `class Mine(Growing, SFTTrainer)`: its updates are then those of a `controller`.

    One "batch" of the Trainer's loop is a whole update; training_step makes it, micro-batch by micro-batch, through
    the Trainer's own compute_loss, which must be a mean over its rows, or over what `items(batch)` counts (tokens).
    `global_step` counts updates, `epoch` passes over the data. The arguments that decide the same as the controller
    must be left alone: ConfigError else.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        controller: Controller,
        items: Callable[[Any], int] | None = None,
        **settings: Any,
    ) -> None:
        if args is None:
            raise ConfigError("args is missing; give TrainingArguments, at least their output_dir")
        check_arguments(args, controller, settings)
        check_rows_by_number(settings.get("train_dataset"), "the training set")
        args = copy.copy(args)
        args.ignore_data_skip = True  # the cursor is in Progress; nothing is skipped by drawing it
        super().__init__(model, args, **settings)  # pyright: ignore[reportCallIssue]
        trainer = self._trainer()
        dataset, collate = _rows(trainer)
        self.course = GrowthSession(
            controller,
            dataset,
            collate=collate,
            items=items,
            world=World(rank=args.process_index, size=args.world_size, device=args.device),
            loading=Loading(workers=args.dataloader_num_workers, prefetch=args.dataloader_prefetch_factor or 4),
        )
        args.max_steps = self.course.remaining()
        trainer.add_callback(GrowthCallback(self.course))

    def _trainer(self) -> Any:
        assert isinstance(self, Trainer), "Growing belongs left of a Trainer in the list of bases"
        return self

    def get_train_dataloader(self) -> Any:
        """The course: one item an update, which does not hold the rows yet."""
        return self.course

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """One that says what the plan has assigned, and changes nothing."""
        trainer = self._trainer()
        check_groups(trainer.optimizer.param_groups)
        trainer.lr_scheduler, trainer._created_lr_scheduler = RatesAsSet(trainer.optimizer), True
        return trainer.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """All micro-batches of one update, forward and backward; this rank's part of the mean loss."""
        trainer, course = self._trainer(), self.course
        model.train()
        plan = course.begin(trainer.model)
        losses: list[Tensor] = []
        for batch, weight, last in course.draw(plan):
            with nullcontext() if last else trainer.accelerator.no_sync(model):
                batch = trainer._prepare_inputs(batch)
                trainer.current_flos += float(super().floating_point_ops(batch))  # pyright: ignore[reportAttributeAccessIssue]
                with trainer.compute_loss_context_manager():
                    loss = weighted(trainer.compute_loss(model, batch), weight)
                trainer.accelerator.backward(loss)
            losses.append(loss.detach())
        course.end(plan, model.parameters())
        assign_lr(trainer.optimizer.param_groups, plan.lr)
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """None beyond what training_step has counted."""
        return 0


class GrowthTrainer(Growing, Trainer):
    """The Transformers Trainer, growing."""


class RatesAsSet(LRScheduler):
    """The learning rates that are in the optimizer, for a loop that wants to hear of them from a scheduler."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int | None = None) -> None:
        """Change nothing."""

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group, as it is."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept: the rate follows from Progress."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing was kept."""


class GrowthCallback(TrainerCallback, ExportableState):
    """Keeps Progress in the Trainer's checkpoints, ends each pass over the data, and training with the budget."""

    def __init__(self, course: GrowthSession) -> None:
        self._course, self._pass = course, 0

    def state(self) -> dict[str, Any]:
        """What trainer_state.json holds of it."""
        return {"args": {}, "attributes": {"progress": self._course.state_dict()}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on where the checkpoint was written, or begin."""
        kept = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None  # pyright: ignore
        if state.global_step and kept is None:
            raise ConfigError("the checkpoint was written without growth: it does not say where the data order was")
        self._course.load_state_dict(kept["attributes"]["progress"] if kept else Progress().to_dict())
        self._look(state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """An update that was skipped is one more to make, which the Trainer has to hear before it counts this one."""
        state.max_steps = state.global_step + 1 + self._course.remaining()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An update has been made."""
        before = self._pass
        self._look(state, control)
        control.should_epoch_stop = control.should_epoch_stop or self._pass > before

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """No more rows are drawn."""
        self._course.close()

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        course = self._course
        state.epoch, state.max_steps = course.epoch, state.global_step + course.remaining()
        self._pass = int(course.epoch)
        control.should_training_stop = control.should_training_stop or course.done


def _rows(trainer: Any) -> tuple[Any, Any]:
    """The training set and the collator, without the columns that the model does not take."""
    dataset = trainer.train_dataset
    if hasattr(dataset, "column_names"):
        return trainer._remove_unused_columns(dataset, description="training"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")


#: Arguments that have to keep their defaults, and what each would do otherwise.
_DECIDED: dict[str, str] = {
    "gradient_accumulation_steps": "is fixed for a run, while the controller's accumulation follows the batch",
    "max_steps": "would end the run elsewhere than the controller's budget",
    "num_train_epochs": "would end the run elsewhere than the controller's budget",
    "lr_scheduler_type": "would fight the controller's lr; say it there as lr.decay",
    "lr_scheduler_kwargs": "would fight the controller's lr; say it there as lr.decay",
    "warmup_steps": "would fight the controller's lr; say it there as lr.decay with a warm-up",
    "warmup_ratio": "would fight the controller's lr; say it there as lr.decay with a warm-up",
    "auto_find_batch_size": "would train on smaller batches than the controller's; set its max_micro",
    "dataloader_drop_last": "would leave samples out",
    "group_by_length": "would order samples otherwise than distgrow, which draws each once per epoch",
    "train_sampling_strategy": "would order samples otherwise than distgrow, which draws each once per epoch",
    "include_num_input_tokens_seen": "counts the tokens of a fixed batch; the ledger counts samples",
    "restore_callback_states_from_checkpoint": "would make a second callback in growth's place",
}
#: Arguments that have to be off.
_OFF: dict[str, str] = {
    "fp16": "scales losses and skips steps by itself; use bf16",
    "deepspeed": "shards gradients and divides by its own accumulation; use distgrow's engine.kind=deepspeed",
    "fsdp": "shards gradients, so an update that is not finite cannot be told on every rank; use DDP",
    "parallelism_config": "gives several ranks the same rows; use DDP",
}


def check_arguments(args: TrainingArguments, controller: Controller, settings: Mapping[str, Any]) -> None:
    """ConfigError with all that TrainingArguments decide otherwise than the controller, one a line."""
    found = list(_problems(args, controller, settings))
    if found:
        raise ConfigError("\n".join(found))


def _problems(args: TrainingArguments, controller: Controller, settings: Mapping[str, Any]) -> Iterator[str]:
    defaults = {field.name: field.default for field in fields(args)}
    for name, why in _DECIDED.items():
        if name in defaults and getattr(args, name) != defaults[name]:
            yield f"{name}={getattr(args, name)} {why}; leave {name} out"
    for name, why in _OFF.items():
        if getattr(args, name, None):
            yield f"{name}={getattr(args, name)!r} {why}"
    shared = {"learning_rate": ("lr.base", controller.lr.base)}
    shared["per_device_train_batch_size"] = ("max_micro", controller.max_micro)
    for name, (ours, value) in shared.items():
        if getattr(args, name) not in (defaults[name], value):
            yield f"{name}={getattr(args, name)!r}, but the controller's {ours} is {value!r}; leave {name} out"
    config: Any = args.accelerator_config
    if config.split_batches or config.dispatch_batches:
        yield "accelerator_config.split_batches and dispatch_batches hand out the batches of one rank; leave them out"
    if args.n_gpu > 1:
        yield f"one process would drive {args.n_gpu} GPUs (DataParallel), which cuts micro-batches up; use torchrun"
    if (settings.get("optimizers") or (None, None))[1] is not None:
        yield "optimizers has a learning-rate scheduler, which would fight the controller's lr; give (optimizer, None)"
