"""fit(): train a model from Python; it builds the parts and starts the loop."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from distgrow.checkpoint.manager import opened, stands_at
from distgrow.checkpoint.remote import build_store
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR
from distgrow.core.scaling import Group
from distgrow.core.spec import Spec
from distgrow.core.stages import Stages
from distgrow.data.dataset import check_rows_by_number
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World, joined
from distgrow.engine.batches import Loss, Metrics
from distgrow.engine.compatible import check_compatible
from distgrow.engine.spec import EngineSpec, Torch, most_rows
from distgrow.growth import Growth
from distgrow.growth.schedule import Schedule
from distgrow.optim import OptimizerSpec
from distgrow.optim.sgd import SGD
from distgrow.run.folder import RunFolder
from distgrow.run.stop import StopRequests
from distgrow.tasks.task import Task
from distgrow.tracking.base import Tracker
from distgrow.tracking.open import check as check_packages
from distgrow.tracking.open import reporting, tracking
from distgrow.training.loss_check import check_loss
from distgrow.training.spec import RunSpec
from distgrow.training.trainer import Result, Trainer


def fit(
    model: nn.Module,
    loss: Loss,
    train: Any,
    *,
    growth: Growth,
    budget: Budget,
    test: Any = None,
    probe: Any = None,
    metrics: Metrics | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    stages: Stages | None = None,
    lr: LR | None = None,
    optimizer: OptimizerSpec | None = None,
    engine: EngineSpec | None = None,
    run: RunSpec | None = None,
    resume: bool | None = False,
    group: Group | None = None,
    storage: str | None = None,
    world: World | None = None,
    about: Mapping[str, Any] | None = None,
    trackers: Sequence[Tracker] = (),
) -> Result:
    """Train `model` in place by a growth schedule; the same in one process, under torchrun and in a Ray worker.

    `loss(model, batch)` is the mean over the batch's rows; `metrics(model, batch)`, for `test`, are means over rows or
    pairs (sum, count);
    `train`, `test` and `probe` (for exact gradients, where `train` augments) are map-style data sets. `resume` None
    goes on where the run's folder holds a run and begins one where it does not. `storage`, a URI of pyarrow's, is where
    checkpoints are kept that `run.dir` cannot hold, as its hosts share no folder. `world` is the ranks, where they are
    joined already. `about` is recorded in config.yaml beside the settings; `trackers` see the first rank's events,
    beside those that always do.
    With a `group` it ends, its state saved, before the first stage that wants another number of ranks: whoever starts
    the ranks has to start those.
    Collective: every rank must call. Raises ValueError (RunError where the run folder is at fault) for settings
    that cannot work, TrainingFailed where too many updates in a row are not finite.
    """
    task = Task(model=model, loss=loss, train=train, test=test, probe=probe, metrics=metrics, collate=collate)
    for name, dataset in (("train", train), ("test", test), ("probe", probe)):
        if dataset is not None or name == "train":
            check_rows_by_number(dataset, name)
    if test is not None and len(test) == 0:
        raise ConfigError("the test set is empty; leave it out, or give it samples")
    stages, lr, optimizer = stages or Stages(), lr or LR(), optimizer or SGD()
    engine, run = engine or Torch(), run or RunSpec()
    check_compatible(growth, optimizer, engine)
    specs: dict[str, Spec] = {"growth": growth, "stages": stages, "lr": lr, "optimizer": optimizer}
    specs |= {"engine": engine, "budget": budget, "run": run}
    settings = {**(about or {}), **{name: spec.model_dump(mode="json") for name, spec in specs.items()}}
    schedule = Schedule(growth=growth, stages=stages, lr=lr, budget=budget)
    folder = RunFolder(run.dir)
    stop = StopRequests(folder)
    ranks = joined(engine.device, alone=engine.needs_group) if world is None else nullcontext(world)
    with stop.watched(), ranks as world:
        controller = schedule.controller(
            len(train),
            world.size,
            group=group,
            max_micro=most_rows(engine.max_micro, len(train)),
            measuring=run.noise,
            seed=run.seed,
        )
        if not (resume or (resume is None and world.on_rank0(folder.begun))):
            controller.check()
        check_packages(run.trackers, world)
        check_loss(task, controller, folder, world, workers=run.loader.workers)
        store = build_store(folder, storage)
        with opened(folder, store, world, settings, specs, resume=resume) as begun:
            if begun:
                controller.check_resumed(lambda: world.on_rank0(lambda: stands_at(store)))
            seed_generators(run.seed, world.device)
            machine = engine.build(model, loss, metrics=metrics, optimizer=optimizer, world=world)
            with (
                tracking(folder, world.rank, controller, trackers) as lines,
                reporting(run.trackers, folder, settings, world, lines) as tracker,
            ):
                job = Trainer(task, controller, machine, tracker, folder, run, world, stop, store)
                measure = engine.max_micro == "auto"
                result = job.resume(measure=measure) if begun else job.begin(measure=measure)
                machine.close()
                return result
