"""Check of a run before it begins: whether each of its stages can be carried out, and is stable."""

from collections.abc import Callable
from itertools import chain, islice

from rich.console import Console

from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.growth.controller import Controller
from distgrow.planning.forecast import Limit, stability_limit, stages, unstable

#: Most problems that are reported. A plan may have one for each of a million stages.
MOST_PROBLEMS = 10


def check(run: Run, world: int | None = None, stands_at: Callable[[], Progress] = Progress) -> None:
    """Check that a run can be carried out. Print a warning if a learning rate passes a known stability limit.

    Args:
        run: The run.
        world: Number of ranks. If None, each stage has the number that it wants.
        stands_at: Returns the progress that the run goes on from. It is called only if earlier stages cannot be
            carried out.

    Raises:
        ConfigError: if it cannot be carried out.
    """
    run.task.check(run.model)
    if run.open_rate and run.growth.goes_by_rate:
        return  # `train` checks it once the rate is measured
    controller = run.controller(world)
    check_probes(run, controller)
    _check_resumed_ranks(run, controller, stands_at)
    controller.check_resumed(stands_at)
    if (limit := _limit(run)) is not None:
        for stage in stages(controller, soonest=True):
            for problem in unstable(limit, controller, stage):
                Console(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {problem}", markup=False)
                return


def _limit(run: Run) -> Limit | None:
    """Return the limit of the learning rate, or None if it or the rate is not known."""
    if run.open_rate:
        return None
    return stability_limit(run.theory, run.optimizer, run.engine.delay, run.extrapolate)


def check_ranks(run: Run, controller: Controller, progress: Progress | None = None) -> None:
    """Check that the engine can be cut over the ranks of all stages that the run may come to.

    Raises:
        ConfigError: if it cannot.
    """
    for ranks in sorted({controller.ranks(stage) for stage, _ in controller.reach(progress)}):
        run.engine.check_ranks(ranks)


def _check_resumed_ranks(run: Run, controller: Controller, stands_at: Callable[[], Progress]) -> None:
    """Check the ranks of a run that goes on from `stands_at()`. ConfigError if the engine cannot be cut over them."""
    try:
        check_ranks(run, controller)
    except ConfigError:  # of a stage that is over, perhaps
        check_ranks(run, controller, stands_at())


def check_probes(run: Run, controller: Controller) -> None:
    """Check that exact probes are possible. Only `train` can check those that have a data set of their own.

    Raises:
        ConfigError: if they are not.
    """
    if run.task.kind == "target":
        return
    run.run.probe.check(controller.epoch, controller.world, controller.epoch, controller.budget.sfo)


def problems(run: Run, controller: Controller) -> list[str]:
    """Return the first constraints that the run would violate, each once."""
    limit = _limit(run)
    violated = (problem for at in controller.reach() for problem in controller.problems(*at))
    rates = (problem for stage in stages(controller, soonest=True) for problem in unstable(limit, controller, stage))
    first = list(dict.fromkeys(islice(chain(violated, rates), MOST_PROBLEMS)))
    checks = (
        lambda: run.task.check(run.model),
        lambda: check_probes(run, controller),
        lambda: check_ranks(run, controller),
    )
    for checked in checks:
        try:
            checked()
        except ConfigError as error:
            first.append(str(error))
    return first
