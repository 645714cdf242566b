"""train_task(): builds the parts of a run and starts its loop, for a config and for fit()."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

from rich.console import Console

from distgrow.checkpoint import pretrained
from distgrow.checkpoint.manager import opened, stands_at
from distgrow.checkpoint.rebudget import Budgeting
from distgrow.checkpoint.remote import build_store
from distgrow.checkpoint.storage import Store
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.core.scaling import Group
from distgrow.data.dataset import check_rows_by_number, check_training_set, is_stream, size_of
from distgrow.data.seeding import seed_generators
from distgrow.data.stream import check_sampled
from distgrow.distributed.world import World, joined
from distgrow.engine.ability import Can
from distgrow.engine.items import Tokens
from distgrow.engine.objective import WeightedLoss, on_meta
from distgrow.growth.base import GrowthPolicy, Measure
from distgrow.growth.branching import Branching
from distgrow.growth.controller import Controller
from distgrow.growth.no_growth import no_growth
from distgrow.run.folder import RunFolder, numbered
from distgrow.run.resume_mode import ResumeMode
from distgrow.run.stop import StopRequests
from distgrow.tasks.task import Task, test_sets
from distgrow.tracking.base import Tracker
from distgrow.tracking.open import check as check_packages
from distgrow.tracking.open import reporting, tracking
from distgrow.training.build_hooks import build_hooks
from distgrow.training.evaluation_hooks import SampleAtEnd
from distgrow.training.initial_weights import begin_with
from distgrow.training.loss_check import check_loss
from distgrow.training.rate_choice import RateChooser
from distgrow.training.result import Result
from distgrow.training.settings import Settings
from distgrow.training.short_run import Stopped
from distgrow.training.trainer import Trainer
from distgrow.training.utilisation import mfu_of_token


def train_task(
    task: Task,
    settings: Settings,
    *,
    resume: ResumeMode,
    rebudget: bool = False,
    group: Group | None = None,
    storage: str | None = None,
    world: World | None = None,
    about: Mapping[str, Any],
    trackers: Sequence[Tracker] = (),
    hooks: Sequence[Any] = (),
) -> Result:
    """Train the task's model in place. Collective: every rank must call.

    Args:
        task: Model, loss and data.
        settings: All specs of the training.
        resume: Whether the run is begun or resumed.
        rebudget: Whether a run that goes on with another budget may change what it has planned.
        group: If given, the run ends after a checkpoint before the first stage that wants another number of ranks.
        storage: URI of the checkpoints. None: the run's folder.
        world: The ranks, if they have been joined already.
        about: Recorded in config.yaml beside the settings. {name} in `run.dir` is the kind of its task.
        trackers: Trackers of rank 0's events, beside those of the settings.
        hooks: Hooks, after those of the settings.

    Raises:
        ConfigError: settings that cannot work; RunError if the run's folder is at fault.
        TrainingFailed: too many updates in a row were not finite.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    resume.check_rebudget(rebudget)
    settings = settings.in_samples(task.tokens)
    _check_parts(task, settings)
    hooks = build_hooks(settings.run, [*hooks, *([] if task.sample is None else [SampleAtEnd(task.sample)])])
    ranks = joined(settings.engine.device, alone=settings.engine.needs_group) if world is None else nullcontext(world)
    with ExitStack() as contexts:
        world = contexts.enter_context(ranks)
        settings.engine.check_cut(task.model, world)  # before there is a folder, which another attempt would find
        folder = _folder(settings.run.dir, resume, about, world)
        settings = settings.kept_in(str(folder.path))
        stop = StopRequests(folder, settings.run.stop_signals, silent=world.rank > 0)
        contexts.enter_context(stop.watched())
        parts = (task, settings, world, folder, build_store(folder, storage), stop)
        given: Any = {"rebudget": rebudget, "group": group, "about": about, "trackers": trackers, "hooks": hooks}
        try:
            result = _train_in(*parts, resume=resume, **given)
        except Stopped:  # as it measured the learning rate
            result = Result(
                progress=Progress(), metrics={}, finished=False, dir=folder.path, reason="stopped on request"
            )
    if stop.interrupted:
        raise KeyboardInterrupt(_farewell(folder, result))  # not of a subclass: Python would exit with 1
    return result


def _train_in(
    task: Task,
    settings: Settings,
    world: World,
    folder: RunFolder,
    store: Store,
    stop: StopRequests,
    *,
    resume: ResumeMode,
    rebudget: bool,
    group: Group | None,
    about: Mapping[str, Any],
    trackers: Sequence[Tracker],
    hooks: Sequence[Any],
) -> Result:
    """Check, open and train the run of a folder, once its first learning rate is known."""
    if settings.lr.unknown:
        check = partial(_check_unmeasured, task, settings, world, folder, store, hooks)
        chooser = RateChooser(
            task=task, settings=settings, folder=folder, store=store, world=world, about=about, stop=stop, check=check
        )
        settings, resume = settings.with_rate(chooser.choose(resume)), ResumeMode.CONTINUE
    plan = settings.planned(size_of(task.train), world.size, group)
    controller = plan(settings.budget)
    if not resume.resumes(lambda: world.on_rank0(folder.begun)):
        _check_new(controller, world)
    recorded = {**about, **settings.recorded()}
    origin = begin_with(settings.init, task.model, folder.path, store, world)
    check_packages(settings.run.trackers, world)
    check_loss(task, controller, folder, world, settings, hooks)
    change = Budgeting(folder, store, settings.budget, plan, accepted=rebudget).change
    with opened(folder, store, world, recorded, settings.specs(), resume=resume, rebudget=change) as begun:
        world.on_rank0(lambda: pretrained.keep(folder, task.model, task.collate, task.train))
        parts = (task, controller, settings, world, folder, store, stop)
        return _train_opened(*parts, recorded, trackers, hooks, origin, resume=begun)


def _check_unmeasured(
    task: Task,
    settings: Settings,
    world: World,
    folder: RunFolder,
    store: Store,
    hooks: Sequence[Any],
    controller: Controller,
) -> None:
    """Check all that can be wrong with a new run before its learning rate is measured, and load its first weights."""
    if not world.on_rank0(folder.begun):
        _check_new(controller, world)
    begin_with(settings.init, task.model, folder.path, store, world)
    check_packages(settings.run.trackers, world)
    check_loss(task, controller, folder, world, settings, hooks)


def _folder(pattern: str, resume: ResumeMode, about: Mapping[str, Any], world: World) -> RunFolder:
    """Return the run's folder, which rank 0 finds. Collective: every rank must call."""
    name = str((about.get("task") or {}).get("kind", "run"))
    return RunFolder(world.on_rank0(lambda: numbered(pattern, resume=resume, name=name)))


def _train_opened(
    task: Task,
    controller: Controller,
    settings: Settings,
    world: World,
    folder: RunFolder,
    store: Store,
    stop: StopRequests,
    recorded: Mapping[str, Any],
    trackers: Sequence[Tracker],
    hooks: Sequence[Any],
    origin: list[str],
    *,
    resume: bool,
) -> Result:
    """Build the engine and open the trackers of a run whose folder is open, and run the loop."""
    run = settings.run
    if resume:
        controller.check_resumed(lambda: world.on_rank0(lambda: stands_at(store)))
    seed_generators(run.seed, world.device)
    parts: dict[str, Any] = {"metrics": task.metrics, "items": task.items, "tokens": _tokens(task, settings)}
    parts |= {
        "optimizer": settings.optimizer,
        "extrapolate": settings.extrapolate,
        "sparsity": settings.sparsity,
        "world": world,
    }
    engine = settings.engine.build(task.model, task.loss, **parts)
    with (
        tracking(folder, world.rank, controller, trackers) as lines,
        reporting(run.trackers, folder, recorded, world, lines) as tracker,
    ):
        trainer = Trainer(task, controller, engine, tracker, folder, run, world, stop, store, hooks, origin)
        trainer.events.mfu_of_token = mfu_of_token(task, settings.engine, run.peak_flops, world)
        measure = settings.engine.max_micro == "auto"
        try:
            result = trainer.resume(measure=measure) if resume else trainer.begin(measure=measure)
        finally:
            trainer.events.write()
        engine.close()
        return result


def _check_parts(task: Task, settings: Settings) -> None:
    """Check that the parts go together, and what kinds of data sets there are. ConfigError if one does not do."""
    settings.check()
    if on_meta(task.model) and not (Can.CUT_MODEL in settings.engine.can and settings.init is None):
        raise ConfigError(
            f"the model is on the meta device, where it has no numbers, and engine.kind={settings.engine.kind}"
            + (" with init" if settings.init is not None else "")
            + " gives it none: build it on a real device, or use engine.kind=fsdp without init"
        )
    settings.optimizer.check_own(
        WeightedLoss(task.model, task.loss).named(),
        task.model,
        None if settings.lr.base == "auto" else settings.lr.base,
    )
    for name, dataset in (("train", task.train), ("probe", task.probe)):
        if dataset is not None or name == "train":
            (check_training_set if name == "train" else check_rows_by_number)(dataset, name)
    if settings.sampling is not None:
        check_sampled(task.train)
        if settings.sampling.draws_size and task.items is not None:
            raise ConfigError(
                f"sampling.kind={settings.sampling.name} divides by the planned batch, in samples, and items say that "
                "the loss is a mean over something else: leave out items, or use sampling.kind=nice"
            )
    for name, dataset in test_sets(task.test).items():
        check_rows_by_number(dataset, f"test[{name!r}]" if name else "test")
        if len(dataset) == 0:
            shown = f"the test set {name!r}" if name else "the test set"
            raise ConfigError(f"{shown} is empty; leave it out, or give it samples")
    _check_branches(task, settings.growth)
    asks = [f"growth.kind={settings.growth.name}"] if Measure.NORM in settings.growth.needs else []
    asks += ["run.probe"] if settings.run.probe.every_epochs is not None else []
    if asks and task.probe is None and is_stream(task.train):
        raise ConfigError(f"{asks[0]} measures gradients over a whole data set, which a stream is not: give probe=")


def _check_branches(task: Task, growth: GrowthPolicy) -> None:
    """Check that branches find the data that they go by. ConfigError if they do not."""
    if not isinstance(growth, Branching):
        return
    if is_stream(task.train):
        raise ConfigError(
            f"growth.kind={growth.name} reads the samples of its branches again, and the training stream has no order "
            "by number: give a map-style data set, or another growth.kind"
        )
    if growth.goes_by != "validation":
        return
    tests, (name, metric) = test_sets(task.test), growth.validates()
    if task.metrics is None and metric != "loss":
        raise ConfigError(f"growth.metric={metric}: the task has no metrics but loss; give metrics=…, or leave it out")
    if not tests:
        raise ConfigError(f"growth.kind={growth.name} goes by the loss of a test set, and there is none: give test=…")
    if (name or "") not in tests and not (name is None and len(tests) == 1):
        known = ", ".join(tests)
        raise ConfigError(f"growth.validation={name}: the test sets are {known or 'one without a name'}; name one")


def _tokens(task: Task, settings: Settings) -> Tokens | None:
    """Return the tokens of a sample, or what counts them. ConfigError if a budget is in tokens that nobody counts."""
    if settings.budget.tokens is None or task.tokens is not None:
        return task.tokens
    items = task.items
    if items is None:
        raise ConfigError(
            f"budget.tokens={settings.budget.tokens} are counted by nobody: give tokens=…, those of every sample or "
            "tokens(batch), to fit() or Task"
        )
    return partial(items)  # not the items themselves: as tokens they must be whole numbers


def _check_new(controller: Controller, world: World) -> None:
    """Check the schedule of a new run, and warn if its batch cannot grow."""
    controller.check()
    sentence = no_growth(controller)
    if sentence is not None and world.rank == 0:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(f"warning: {sentence}")


def _farewell(folder: RunFolder, result: Result) -> str:
    if result.finished:
        return f"Ctrl-C: run.dir={folder.path} was finished by then; nothing is lost"
    if not result.progress.ledger.total:
        return f"Ctrl-C: run.dir={folder.path} holds no update; go on with --resume"
    return f"Ctrl-C: run.dir={folder.path} holds a checkpoint of step {result.progress.step}; go on with --resume"
