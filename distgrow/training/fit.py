"""fit(): trains a model from Python."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgrow.core.average import EMA, Tail
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.lr import LR
from distgrow.core.sampling import SamplingSpec
from distgrow.core.scaling import Group
from distgrow.core.sparsity import Sparsity
from distgrow.core.stages import Stages
from distgrow.distributed.world import World
from distgrow.engine.batches import Loss, Metrics
from distgrow.engine.spec import EngineSpec
from distgrow.growth.base import GrowthPolicy
from distgrow.optim import OptimizerSpec
from distgrow.run.resume_mode import Resume, ResumeMode
from distgrow.tasks.task import Task
from distgrow.tracking.base import Tracker
from distgrow.training.arguments import check_arguments
from distgrow.training.init import Init
from distgrow.training.own_optimizer import as_spec
from distgrow.training.result import Result
from distgrow.training.settings import Settings
from distgrow.training.spec import RunSpec
from distgrow.training.train_task import train_task


@contextmanager
def _in_python() -> Iterator[None]:
    """Make errors name the arguments `resume=True` and `rebudget=True`, as there is no command line with options."""
    try:
        yield
    except (ConfigError, TrainingFailed, KeyboardInterrupt) as error:
        error.args = tuple(
            part.replace("--resume", "resume=True").replace("--rebudget", "rebudget=True")
            if isinstance(part, str)
            else part
            for part in error.args
        )
        raise


@_in_python()
def fit(
    model: nn.Module,
    loss: Loss,
    train: Any,
    *,
    growth: GrowthPolicy,
    budget: Budget,
    test: Any = None,
    probe: Any = None,
    metrics: Metrics | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    items: Callable[[Any], Any] | None = None,
    tokens: int | Callable[[Any], Any] | None = None,
    stages: Stages | None = None,
    lr: LR | None = None,
    optimizer: OptimizerSpec | torch.optim.Optimizer | Sequence[Any] | Callable[[Any], Any] | None = None,
    average: EMA | Tail | None = None,
    sampling: SamplingSpec | None = None,
    extrapolate: Extrapolate | None = None,
    sparsity: Sparsity | None = None,
    init: Init | str | Path | None = None,
    engine: EngineSpec | None = None,
    run: RunSpec | None = None,
    resume: Resume = False,
    rebudget: bool = False,
    group: Group | None = None,
    storage: str | None = None,
    world: World | None = None,
    about: Mapping[str, Any] | None = None,
    trackers: Sequence[Tracker] = (),
    hooks: Sequence[Any] = (),
) -> Result:
    """Train `model` in place by a growth schedule.

    The same call works in one process, under torchrun and in a Ray worker. Collective: every rank must call.

    Args:
        model: The model.
        loss: `loss(model, batch)` returns the mean over the rows of the batch, or over `items`.
        train: The training set, map-style or iterable; see docs/data.md.
        growth: The growth policy.
        budget: When the run is over.
        test: The test set, map-style, or a dict of several by name, whose metrics are name/metric. None: no evaluation.
        probe: The data set of exact gradients, map-style, for a training set that augments. None: `train`.
        metrics: `metrics(model, batch)` returns a dict for `test`: means over rows, or pairs (sum, count).
        collate: Makes a batch of a list of samples. None: torch's default.
        items: `items(batch)` counts what the batch's loss is a mean over, such as tokens that are no padding. The
            update is then the mean over all items of the global batch. None: the loss is a mean over rows.
        tokens: Tokens of every sample, which can then be a unit of budget, stages and intervals; or `tokens(batch)`,
            which counts those of a batch. None: the items.
        stages: How long stages are.
        lr: The learning rate. None: the optimizer's own, if it is not a spec, else 0.1.
        optimizer: A spec such as AdamW(), an optimizer over the model's parameters, several, a class of optimizers, or
            a function of the model that returns one or several. None: SGD.
        average: An average of the parameters, evaluated beside them. None: there is none.
        sampling: How the rows of an update are drawn. None: along shuffled passes, each sample once an epoch.
        extrapolate: At which shifted point gradients are evaluated. None: at the parameters.
        sparsity: How the model is pruned while it trains, such as `sparsity(0.8)`. None: it stays dense.
        init: The weights that a new run begins with: another run's folder, a file of weights, or `init_from(…)`. A
            resume does not read them again. None: those of `model`.
        engine: What computes. None: `Torch()`.
        run: Where the run is kept, and its habits.
        resume: True: resume. False: begin. None: resume if `run.dir` holds a run, else begin.
        rebudget: Let a run that is resumed with another budget change its plan, too: growth and learning rates that are
            cut to the budget. Without it, only where the run ends may change.
        group: If given, the run ends, its state saved, before the first stage that wants another number of ranks.
            Whoever starts ranks must then start those.
        storage: URI (pyarrow's) of the checkpoints, if the hosts share no folder. None: `run.dir`.
        world: The ranks, if they have been joined already.
        about: Recorded in config.yaml beside the settings.
        trackers: Trackers of rank 0's events, beside those that every run has.
        hooks: What is called at the run's events and may end it: objects of subclasses of `Hook`.

    Raises:
        ConfigError: An argument that cannot work; RunError if the run's folder is at fault.
        TrainingFailed: Too many updates in a row were not finite.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    specs: Any = {"growth": growth, "budget": budget, "stages": stages, "sampling": sampling, "init": init, "run": run}
    specs |= {"average": average, "extrapolate": extrapolate, "sparsity": sparsity, "engine": engine}
    specs |= as_spec(optimizer, model, lr)
    check_arguments(specs, model, loss, metrics, collate, items, tokens, beside=(trackers, hooks, about, group))
    data: dict[str, Any] = {"train": train, "test": test, "probe": probe, "collate": collate, "items": items}
    task = Task(model=model, loss=loss, metrics=metrics, tokens=tokens, **data)
    given: Any = {"about": about or {}, "trackers": trackers, "hooks": hooks, "rebudget": rebudget, "world": world}
    return train_task(task, Settings.of(specs), resume=ResumeMode.of(resume), group=group, storage=storage, **given)
