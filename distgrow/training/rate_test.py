"""Rate test: which learning rates are stable at b₀, by short runs from the first weights; keeps nothing of them."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import constant_lr
from distgrow.core.rate_test import MOST_POWER, first_updates, margin
from distgrow.core.stages import Stages
from distgrow.data.dataset import is_stream, size_of
from distgrow.data.iterable import IterableStream, digests
from distgrow.distributed.world import World
from distgrow.growth.constant import Constant
from distgrow.growth.controller import Controller
from distgrow.run.folder import RunFolder
from distgrow.run.stop import StopRequests
from distgrow.tasks.task import Task
from distgrow.training.settings import Settings
from distgrow.training.short_run import WINDOW, last_loss, scratch, trained

#: A rate at which an update moves nothing.
STILL = 1e-30
#: How the names of the folders begin that hold short runs while they last.
SCRATCH = ".range-test-"
#: Rows of a stream that are read twice.
COMPARED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RateResult:
    """Hold one short run."""

    lr: float
    loss: float  #: mean training loss over the last quarter of its samples; inf if it diverged
    evaluations: int
    seconds: float

    def line(self) -> str:
        """Return what to print of it."""
        loss = f"training loss {self.loss:.4f}" if math.isfinite(self.loss) else "diverged"
        return f"lr {self.lr:.4g}: {loss}, {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class RateResults:
    """Hold all short runs, and what follows from them."""

    first: RateResult  #: of the first weights, that moves nothing
    tried: tuple[RateResult, ...]  #: by learning rate
    updates: int  #: of each

    def stable(self, result: RateResult) -> bool:
        """Return whether a run has not diverged: its last loss is finite and below that of the first weights."""
        return math.isfinite(result.loss) and result.loss < self.first.loss

    @property
    def kept(self) -> list[RateResult]:
        """Return the stable ones."""
        return [result for result in self.tried if self.stable(result)]

    @property
    def largest(self) -> float | None:
        """Return the largest stable learning rate; None: there is none."""
        return max((result.lr for result in self.kept), default=None)

    @property
    def proposed(self) -> float | None:
        """Return the rate of the least loss, but at most the largest stable one by `margin`; None: none is stable.

        Short runs prefer rates so near to the edge that a long run is likely to pass it.
        """
        largest = self.largest
        if largest is None:
            return None
        return min(largest / margin(self.updates), min(self.kept, key=lambda result: result.loss).lr)

    @property
    def evaluations(self) -> int:
        """Return the gradient evaluations of all."""
        return self.first.evaluations + sum(result.evaluations for result in self.tried)

    @property
    def seconds(self) -> float:
        """Return the seconds of all."""
        return self.first.seconds + sum(result.seconds for result in self.tried)


def next_power(tried: Mapping[int, bool]) -> int | None:
    """Return the power to try next, given which are stable; None: the edge, or an end of the range, is found.

    From 0 it goes up as long as runs are stable; if the first is not, down to the first that is.
    """
    if not tried:
        return 0
    if tried[0]:
        return max(tried) + 1 if tried[max(tried)] and max(tried) < MOST_POWER else None
    return min(tried) - 1 if not tried[min(tried)] and min(tried) > -MOST_POWER else None


def find_rates(
    settings: Settings,
    first: float,
    updates: int,
    task: Task,
    folder: RunFolder,
    world: World,
    tell: Callable[[RateResult], None],
    stop: StopRequests | None = None,
) -> RateResults:
    """Make short runs until the edge of stability is found. Collective: every rank must call.

    Args:
        settings: Of growth only b₀ is used; learning rate, stages and budget are not.
        first: The rate that is tried first.
        updates: Updates of each run, at constant b₀ and η.
        task: Model, loss and data. The model keeps its weights.
        folder: Files of the short runs are kept here while they last.
        world: The ranks.
        tell: Called after each run, on every rank.
        stop: See `trained`.

    Raises:
        ConfigError: Such runs cannot be made.
        Stopped: On request.
    """
    _check_begins_again(task, settings, world)
    tried = dict[int, RateResult]()
    with scratch(folder.path, SCRATCH, world) as place:
        run = partial(_run, settings, task=task, folder=place, world=world, stop=stop)
        begin = RateResults(first=run(STILL, first_updates(settings.growth.start)), tried=(), updates=updates)
        tell(begin.first)
        while (power := next_power({at: begin.stable(result) for at, result in tried.items()})) is not None:
            tried[power] = run(first * 2.0**power, updates)
            tell(tried[power])
    return replace(begin, tried=tuple(tried[power] for power in sorted(tried)))


def _check_begins_again(task: Task, settings: Settings, world: World) -> None:
    """Check that a training set that is read from its beginning can be read so again.

    Raises:
        ConfigError: Its first rows are others the second time.
    """
    if not is_stream(task.train):
        return

    def first_rows() -> list[str]:
        return IterableStream(task.train, seed=settings.run.seed, collate=digests).__getitems__(range(COMPARED))

    def compare() -> None:
        if first_rows() != first_rows():
            raise ConfigError(
                "short runs read the training set from its beginning each time, and its first rows were others the "
                "second time: let its __iter__ begin anew, or give lr.base a number"
            )

    world.on_all_ranks(compare)


def _run(
    settings: Settings,
    lr: float,
    updates: int,
    *,
    task: Task,
    folder: RunFolder,
    world: World,
    stop: StopRequests | None,
) -> RateResult:
    """Make one short run from the task's own weights; every rank has its result."""
    began = time.monotonic()
    controller = constant(settings, lr, updates, size_of(task.train), world.size)
    dense, untested = settings.model_copy(update={"sparsity": None}), replace(task, test=None)
    recorder, _ = trained(dense, controller, untested, folder, world, begin=True, stop=stop)
    curve = [(e["samples"], math.inf if e["loss"] is None else e["loss"]) for e in recorder.updates]
    loss = last_loss(curve, 1.0 if lr == STILL else WINDOW) if len(curve) == updates else math.inf
    spent, seconds = recorder.last.get("sfo", 0), time.monotonic() - began
    found = RateResult(lr=0.0 if lr == STILL else lr, loss=loss, evaluations=spent, seconds=seconds)
    return world.on_rank0(lambda: found)


def constant(settings: Settings, lr: float, updates: int, epoch: int, world: int) -> Controller:
    """Return the decisions of a short run: `updates` of b₀ samples at a constant learning rate.

    Raises:
        ConfigError: They cannot be carried out.
    """
    start = settings.growth.start
    changed = {
        "growth": Constant(start=start),
        "lr": constant_lr(lr),
        "stages": Stages(),
        "budget": Budget(samples=updates * start),
        "average": None,
        "sparsity": None,
    }
    controller = settings.model_copy(update=changed).controller_of(epoch, world)
    controller = replace(controller, active=None, weights=None)
    controller.check()
    return controller
