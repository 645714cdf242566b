"""Growth under the Transformers Trainer: a mixin, its Trainer and their callback."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.core.progress import Progress
from distgrow.data.dataset import check_rows_by_number
from distgrow.data.spec import Loading
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller
from distgrow.integrations.labels import Labels
from distgrow.integrations.session import GrowthSession, weighted
from distgrow.integrations.session_checks import check_groups
from distgrow.integrations.transformers_checks import check_arguments
from distgrow.optim.groups import assign_lr


class Growing:
    """Makes the updates of a Trainer on whose left it stands: `class Mine(Growing, SFTTrainer)`.

    One "batch" of the Trainer's loop is a whole update. training_step makes it, micro-batch by micro-batch, through
    the Trainer's own compute_loss. `global_step` counts updates, `epoch` passes over the data.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        controller: Controller,
        items: Callable[[Any], int] | None = None,
        record: str | Path | None = None,
        **settings: Any,
    ) -> None:
        """Take the Trainer's arguments, and a controller in place of those that decide the same.

        Args:
            model: As the Trainer's.
            args: As the Trainer's.
            controller: Decides batches and learning rates.
            **settings: The Trainer's other arguments.
            items: Counts what compute_loss is a mean over. By default that is what the Trainer counts (labels other
                than -100), if the model takes `num_items_in_batch`, else the rows of a micro-batch.

            record: Folder for config.yaml and metrics.jsonl, which `distgrow report` reads. None: nothing is written.

        Raises:
            ConfigError: Some of `args` decide the same as the controller; they must be left alone.
        """
        if args is None:
            raise ConfigError("args is missing; give TrainingArguments, at least their output_dir")
        check_arguments(args, controller, settings)
        check_rows_by_number(settings.get("train_dataset"), "the training set")
        args = copy.copy(args)
        args.ignore_data_skip = True  # the cursor is in Progress; nothing is skipped by drawing it
        if args.world_size > 1:
            args.average_tokens_across_devices = True
        super().__init__(model, args, **settings)  # pyright: ignore[reportCallIssue]
        trainer = self._trainer()
        dataset, collate = _rows(trainer)
        self.session = GrowthSession(
            replace(controller, seed=seed_of(args, controller)),
            dataset,
            collate=collate,
            items=items,
            record=record,
            world=World(rank=args.process_index, size=args.world_size, device=args.device),
            loading=Loading(workers=args.dataloader_num_workers, prefetch=args.dataloader_prefetch_factor or 4),
        )
        self._labels, self._shown = Labels(trainer), dict[str, float]()
        args.max_steps = self.session.remaining()
        trainer.add_callback(GrowthCallback(self.session))

    @property
    def course(self) -> GrowthSession:
        """Return `session`, by its former name."""
        return self.session

    def _trainer(self) -> Any:
        assert isinstance(self, Trainer), "Growing belongs left of a Trainer in the list of bases"
        return self

    def get_train_dataloader(self) -> Any:
        """Return the session: one item an update, which does not hold the rows yet."""
        return self.session

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return a scheduler that says what the plan has assigned, and changes nothing."""
        trainer = self._trainer()
        check_groups(trainer.optimizer.param_groups)
        trainer.lr_scheduler, trainer._created_lr_scheduler = RatesAsSet(trainer.optimizer), True
        return trainer.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Make forward and backward of all micro-batches of one update; return this rank's part of the mean loss."""
        trainer, session = self._trainer(), self.session
        model.train()
        plan = session.begin(trainer.model)
        losses: list[Tensor] = []
        for batch, weight, items, last in self._drawn(plan):
            with nullcontext() if last else trainer.accelerator.no_sync(model):
                batch = trainer._prepare_inputs(batch)
                trainer.current_flos += float(super().floating_point_ops(batch))  # pyright: ignore[reportAttributeAccessIssue]
                with trainer.compute_loss_context_manager():
                    loss = weighted(trainer.compute_loss(model, batch, num_items_in_batch=items), weight)
                trainer.accelerator.backward(loss)
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        session.end(plan, model.parameters(), loss)
        self._shown = session.shown(plan)
        assign_lr(trainer.optimizer.param_groups, plan.lr)
        return loss

    def _drawn(self, plan: Plan) -> Iterator[tuple[Any, float, Any, bool]]:
        """Yield the update's micro-batches: rows, weight of the loss, items that it is divided by, whether the last."""
        drawn = self.session.draw(plan)
        if self.session.counts_items:
            yield from ((batch, weight, None, last) for batch, weight, last in drawn)
        elif self._labels.can_be_counted():
            batches = [batch for batch, _, _ in drawn]
            if self._labels.are_counted(batches[0]):
                items = self._labels.count(batches)
                yield from ((batch, 1.0, items, k == len(batches)) for k, batch in enumerate(batches, start=1))
            else:
                weights = [plan.weight(len(rows)) for rows in plan.rows(0, self.session.world.rank)]
                yield from self._rows_alike(zip(batches, weights, [False] * (len(batches) - 1) + [True], strict=True))
        else:
            yield from self._rows_alike(drawn)

    def _rows_alike(self, drawn: Iterable[tuple[Any, float, bool]]) -> Iterator[tuple[Any, float, Any, bool]]:
        for batch, weight, last in drawn:
            self._labels.check(batch)
            yield batch, weight, None, last

    def log(self, logs: dict[str, float], *others: Any, **options: Any) -> None:
        """Log the batch, the stage, the samples and the gradient evaluations beside the loss of updates."""
        shown = self._shown if "loss" in logs else {}
        super().log({**logs, **shown}, *others, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0, for training_step has counted all."""
        return 0


class GrowthTrainer(Growing, Trainer):
    """The Transformers Trainer, growing."""


def seed_of(args: TrainingArguments, controller: Controller) -> int:
    """Return the seed of the run: the controller's, unless TrainingArguments give one.

    Raises:
        ConfigError: They disagree.
    """
    default = next(field.default for field in fields(args) if field.name == "seed")
    given = {name: value for name in ("seed", "data_seed") if (value := getattr(args, name)) not in (None, default)}
    seeds = {*given.values(), *([controller.seed] if controller.seed else [])}
    if len(seeds) > 1:
        raise ConfigError(
            f"{', '.join(f'{name}={value}' for name, value in given.items())} and the controller's seed="
            f"{controller.seed} differ; one seed decides rows and dropout: give one, best as Controller(seed=…)"
        )
    return next(iter(seeds), controller.seed)


class RatesAsSet(LRScheduler):
    """Tells the learning rates that are in the optimizer to a loop that asks a scheduler for them."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int | None = None) -> None:
        """Change nothing."""

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group, as it is."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the rate follows from Progress."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing."""


class GrowthCallback(TrainerCallback, ExportableState):
    """Keeps Progress in the Trainer's checkpoints, ends each pass over the data, and training with the budget."""

    def __init__(self, session: GrowthSession) -> None:
        self._session, self._pass = session, 0

    def state(self) -> dict[str, Any]:
        """Return what trainer_state.json holds of the run."""
        return {"args": {}, "attributes": {"progress": self._session.state_dict()}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on where the checkpoint was written, or begin."""
        kept = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None  # pyright: ignore
        if state.global_step and kept is None:
            raise ConfigError("the checkpoint was written without growth: it does not say where the data order was")
        self._session.load_state_dict(kept["attributes"]["progress"] if kept else Progress().to_dict())
        self._look(state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the Trainer, before it counts this update, that one that was skipped is to be made again."""
        state.max_steps = state.global_step + 1 + self._session.remaining()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the epoch with a pass over the data."""
        before = self._pass
        self._look(state, control)
        control.should_epoch_stop = control.should_epoch_stop or self._pass > before

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Record the metrics of an evaluation, by their names without eval_."""
        self._session.evaluated({name.removeprefix("eval_"): value for name, value in (metrics or {}).items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw no more rows."""
        self._session.close()

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        session = self._session
        state.epoch, state.max_steps = session.epoch, state.global_step + session.remaining()
        self._pass = int(session.epoch)
        control.should_training_stop = control.should_training_stop or session.done


def _rows(trainer: Any) -> tuple[Any, Any]:
    """Return the training set and the collator, without the columns that the model does not take."""
    dataset = trainer.train_dataset
    if hasattr(dataset, "column_names"):
        return trainer._remove_unused_columns(dataset, description="training"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
