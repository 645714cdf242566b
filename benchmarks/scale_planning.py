"""What deciding an update costs, against world size, steps, samples and stages; pure, in one process, trains nothing.

Each point of an axis is a run in the middle of its way, of which one rank's decisions are timed: everything that
distgrow does for an update beside drawing rows, computing and logging.
"""

import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from paired import Block, Spread, interleave, ratio, spread, timed

from distgrow.core.budget import Budget
from distgrow.core.lr import LR, Cosine
from distgrow.core.noise_stats import Measured
from distgrow.core.order import Order, seeds
from distgrow.core.plan import Plan
from distgrow.core.progress import Ledger, Outcome, Progress
from distgrow.core.stages import Every, Stages
from distgrow.growth import Growth
from distgrow.growth.auto import Auto
from distgrow.growth.controller import Controller
from distgrow.growth.exponential import Exponential
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.seesaw import Seesaw
from distgrow.growth.steps import Steps

#: Steps are those that measure noise.
AXES: dict[str, tuple[int, ...]] = {
    "world": (1, 10, 100, 1_000, 10_000, 100_000),
    "step": (16, 1_600, 160_000, 16_000_000, 160_000_000),
    "samples": (10**3, 10**6, 10**9, 10**12),
    "stages": (1, 10, 100, 1_000, 10_000, 100_000),
}
UPDATE = "whole decision"
PARTS = ("advance", "plan", "rows", "after", "order")
SHARE, MICRO = 128, 64  #: rows of a rank, in two micro-batches
CALLS = 50  #: of a block
OUTCOME = Outcome(loss=1.0, grad_norm=1.0, measured=Measured(parts_sq=2.0, batch_sq=1.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Name a run and how far it has come."""

    axis: str
    at: int
    growth: str
    world: int = 8
    step: int = 1_000_000
    samples: int = 10**6  #: of the training set
    stages: int = 1  #: of a list of stages, of which it is in the middle one

    @property
    def batch(self) -> int:
        """Return the samples of the global batch."""
        return SHARE * self.world

    @property
    def applied(self) -> int:
        """Return the samples applied so far."""
        return self.step * self.batch

    def controller(self) -> Controller:
        """Return the controller of a run that is at most a quarter done."""
        batch, length = self.batch, self.applied // (self.stages // 2) if self.stages > 1 else self.applied + 1
        growths: dict[str, Growth] = {
            "exponential": Exponential(start=batch, factor=2, cap=16 * batch),
            "steps": Steps(batches=[batch] * self.stages),
            "seesaw": Seesaw(start=batch, factor=2, cap=16 * batch),
            "noise scale": NoiseScale(start=batch, cap=16 * batch),
            "auto": Auto(start=batch, cap=16 * batch),
        }
        growth, stages = growths[self.growth], Stages()
        if self.growth in ("exponential", "steps"):
            stages = Stages(every=Every(samples=[length] * self.stages if self.growth == "steps" else length))
        return Controller(
            growth=growth,
            stages=stages,
            lr=LR(base=0.1, decay=Cosine()) if self.growth == "seesaw" else LR(base=0.1),
            budget=Budget(samples=4 * self.applied + self.samples),
            epoch=self.samples,
            world=self.world,
            max_micro=MICRO,
        )

    def progress(self, controller: Controller) -> Progress:
        """Return the progress, with measured noise and a falling loss, so that no policy grows now."""
        here = Progress(step=self.step, samples=self.applied, stage=self.stages // 2)
        here = replace(here, ledger=Ledger(applied=self.applied))
        noisy = here
        for update in range(30):
            noisy = noisy.after(controller.plan(noisy), replace(OUTCOME, loss=2.0 - update / 30))
        here = replace(here, noise=noisy.noise)
        assert controller.advance(here) == here, self
        return here


def parts(place: Place) -> Mapping[str, Callable[[], Any]]:
    """Return the parts of the last rank's decision, and the whole decision."""
    controller, rank = place.controller(), place.world - 1
    progress, order = place.progress(controller), Order(n=place.samples)
    plan = controller.plan(progress)

    def look_up(plan: Plan) -> list[Any]:
        positions = [np.arange(part.start, part.stop) for part in plan.rows(progress.samples, rank)]
        return [(order(some), seeds(0, some)) for some in positions]

    def whole() -> Progress:
        now = controller.advance(progress)
        decided = controller.plan(now)
        look_up(decided)
        return now.after(decided, OUTCOME)

    return {
        "advance": lambda: controller.advance(progress),
        "plan": lambda: controller.plan(progress),
        "rows": lambda: plan.rows(progress.samples, rank),
        "after": lambda: progress.after(plan, OUTCOME),
        "order": lambda: look_up(plan),
        UPDATE: whole,
    }


def places() -> Iterator[Place]:
    """Every point of every axis, of the policies that go with it."""
    for axis, points in AXES.items():
        for at in points:
            for growth in ("steps",) if axis == "stages" else ("exponential", "seesaw", "noise scale", "auto"):
                yield Place(axis=axis, at=at, growth=growth, **{axis: at})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of a part of a decision along an axis, by its points; of the last point over the first."""

    axis: str
    growth: str
    part: str
    points: list[int]
    us: list[Spread]
    over: Spread
    peak_bytes: list[int]  #: that a whole decision takes beside what is there; of other parts empty


def measure(rounds: int) -> list[Cost]:
    """All blocks in turns; then the peak memory of one decision at each point."""
    work = {
        (place, name): action
        for place in places()
        for name, action in parts(place).items()
        if name == UPDATE or place.growth in ("exponential", "steps") or (place.growth, name) == ("seesaw", "advance")
    }
    blocks = {f"{number}": repeated(action) for number, action in enumerate(work.values())}
    seconds = dict(zip(work, interleave(blocks, rounds).values(), strict=True))
    rows = dict.fromkeys((place.axis, place.growth, part) for place, part in work)
    peaks = {key: peak(action) for key, action in work.items() if key[1] == UPDATE}
    return [cost(seconds, peaks, row) for row in rows]


def cost(
    seconds: Mapping[tuple[Place, str], list[float]], peaks: Mapping[tuple[Place, str], int], row: tuple[str, str, str]
) -> Cost:
    """Return a row of the measurements."""
    axis, growth, part = row
    found = [key for key in seconds if (key[0].axis, key[0].growth, key[1]) == row]
    return Cost(
        axis=axis,
        growth=growth,
        part=part,
        points=[place.at for place, _ in found],
        us=[spread([value / CALLS * 1e6 for value in seconds[key]]) for key in found],
        over=ratio(seconds[found[-1]], seconds[found[0]]),
        peak_bytes=[peaks[key] for key in found if key in peaks],
    )


def setting_up(rounds: int) -> dict[int, Spread]:
    """Measure the milliseconds of making and checking a controller, once a run, by its number of stages."""
    places = [Place(axis="stages", at=at, growth="steps", stages=at) for at in AXES["stages"]]
    blocks = {f"{place.at}": timed(lambda place=place: place.controller().check()) for place in places}
    seconds = interleave(blocks, rounds)
    return {int(at): spread([value * 1e3 for value in values]) for at, values in seconds.items()}


def repeated(action: Callable[[], Any]) -> Block:
    """Return a block of calls."""

    def block() -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            action()
        return time.perf_counter() - began

    return block


def peak(action: Callable[[], Any]) -> int:
    """Return the most bytes that Python and numpy hold during a call."""
    tracemalloc.start()
    action()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    action()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return most
