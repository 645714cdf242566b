"""Proposal of (b₀, η, cap) for a number of workers or of updates, from the rates that short runs found. Trains nothing.

It is growth of kind matched, so that η/b falls along a line to the end of the budget. At one temperature, η/b or for
Adam-like optimizers η/√b, b₀ may be any, as long as η₀ is stable. Up to there fewer updates come from a larger b₀,
beyond it from growth alone. Derived for this project, after the bound of the last iterate in arXiv 2607.27731.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distgrow.config.run import Run
from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, NoDecay
from distgrow.core.progress import Progress
from distgrow.core.stages import Stages
from distgrow.growth.matched import Matched
from distgrow.theory.noise import fastest_batch

#: The finest part of the budget that `hold` is chosen by.
FINEST = 10_000
#: Forgiven difference of a rate from the largest stable one: that of two powers.
SLACK = 1 + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Hold what the run is to suit."""

    workers: int | None = None
    micro: int | None = None  #: rows that a worker computes at once
    steps: int | None = None  #: updates

    @classmethod
    def of(cls, workers: int | None, micro: int | None, steps: int | None) -> "Wish | None":
        """Return the wish; None: there is none."""
        return None if workers is micro is steps is None else cls(workers=workers, micro=micro, steps=steps)

    def check(self, run: Run) -> None:
        """Check what can be checked before anything is measured.

        Raises:
            ConfigError: It cannot be met.
        """
        if self.micro is not None and self.workers is None:
            raise ConfigError(
                f"--micro={self.micro}: these are the rows that each worker computes at once, but the number of "
                "workers is missing: give --workers (1 or more) too, or leave --micro out"
            )
        if run.budget.total(run.task.train_size()) is None:
            raise ConfigError(
                f"budget.steps={run.budget.steps} leaves open how many samples there are, which a proposal divides "
                "among updates: give budget.epochs or budget.samples"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Hold what short runs found at one batch."""

    batch: int
    proposed: float
    largest: float  #: that is stable


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Hold a schedule that is proposed."""

    start: int
    lr: float
    cap: int
    hold: float
    updates: int
    why: str  #: what the cap comes from
    run: Run  #: the config with it

    def config(self, wish: Wish) -> dict[str, Any]:
        """Return the keys of a config that differ."""
        growth = {"kind": "matched", "start": self.start, "cap": self.cap}
        lr: dict[str, Any] = {"base": self.lr}
        if not isinstance(self.run.lr.decay, NoDecay):
            lr["decay"] = self.run.lr.decay.model_dump(mode="json", exclude_none=True)
        found: dict[str, Any] = {"growth": growth | ({"hold": self.hold} if self.hold else {}), "lr": lr, "stages": {}}
        found |= {} if wish.workers is None else {"launch": {"workers": wish.workers}}
        return found | ({} if wish.micro is None else {"engine": {"max_micro": wish.micro}})

    def text(self, wish: Wish) -> str:
        """Return these keys as YAML."""
        return yaml.safe_dump(self.config(wish), sort_keys=False, default_flow_style=None)

    def line(self) -> str:
        """Return the proposal in words."""
        held = f", held for {self.hold:.2%} of the budget" if self.hold else ""
        return (
            f"proposed: b₀ {self.start}, lr {self.lr:.4g}, cap {self.cap} ({self.why}){held}: "
            f"{counted(self.updates, 'update')}"
        )


def propose(run: Run, wish: Wish, rates: Rates, critical: int | None = None) -> Proposal:
    """Return a schedule for the run's budget.

    Args:
        run: The config. Its growth is replaced, its lr.decay kept.
        wish: What the run is to suit.
        rates: What short runs found at b₀.
        critical: The critical batch, if it was measured.

    Raises:
        ConfigError: No stable schedule meets the wish.
    """
    scaled = _Scaled(run=run, rates=rates, unit=wish.workers or 1)
    if wish.steps is not None:
        return _in_steps(scaled, wish.steps, critical)
    start = scaled.rounded_up(rates.batch)
    cap, why = _cap(run, wish, start, critical)
    return scaled.proposal(start, cap, 0.0, why)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scaled:
    """Hold the run and what its rates become at other batches."""

    run: Run
    rates: Rates
    unit: int  #: workers, whose multiples batches are

    @property
    def power(self) -> float:
        """Return the power of the batch that η follows at one temperature."""
        return 1.0 if self.run.optimizer.scaling == "linear" else 0.5

    @property
    def samples(self) -> int:
        """Return the samples of the whole run."""
        total = self.run.in_samples(self.run.task.tokens_per_sample()).budget.total(self.run.task.train_size())
        assert total is not None
        return total

    def rounded_up(self, batch: float) -> int:
        """Return the least batch from `batch` on that divides over the workers."""
        return self.unit * max(1, math.ceil(batch / self.unit - 1e-9))

    def rounded_down(self, batch: float) -> int:
        """Return the largest batch up to `batch` that divides over the workers; 0: none does."""
        return self.unit * math.floor(batch / self.unit)

    def lr(self, start: int) -> float:
        """Return η₀ at another b₀: at the temperature of the proposed rate, but stable."""
        return min(self.rates.largest, self.rates.proposed * (start / self.rates.batch) ** self.power)

    def most_start(self) -> int:
        """Return the largest b₀ at that temperature whose η₀ is stable."""
        ratio = (self.rates.largest / self.rates.proposed) ** (1 / self.power)
        return max(self.rounded_up(self.rates.batch), self.rounded_down(self.rates.batch * ratio * SLACK))

    def with_schedule(self, start: int, cap: int, hold: float) -> Run:
        """Return the config with a schedule."""
        growth = Matched(start=start, cap=cap, hold=hold)
        lr = LR(base=self.lr(start), decay=self.run.lr.decay)
        launch = self.run.launch.model_copy(update={"workers": self.unit})
        return self.run.model_copy(update={"growth": growth, "lr": lr, "stages": Stages(), "launch": launch})

    def updates(self, start: int, cap: int, hold: float = 0.0) -> int:
        """Return the updates of a schedule."""
        controller = self.with_schedule(start, cap, hold).controller(self.unit)
        return sum(count for _, _, count in controller.outline(Progress()))

    def proposal(self, start: int, cap: int, hold: float, why: str) -> Proposal:
        """Return a schedule, checked.

        Raises:
            ConfigError: It cannot be carried out.
        """
        run = self.with_schedule(start, cap, hold)
        run.controller(self.unit).check()
        updates = self.updates(start, cap, hold)
        return Proposal(start=start, lr=run.lr.initial, cap=cap, hold=hold, updates=updates, why=why, run=run)


def _cap(run: Run, wish: Wish, start: int, critical: int | None) -> tuple[int, str]:
    """Return the cap, a multiple of the workers' full micro-batches if it holds any, and where it comes from."""
    workers, pace = wish.workers or 1, run.launch.pace
    if critical is not None:
        most, why = critical, "the critical batch that probe-batch found"
    elif pace is not None and pace.latency_s > 0 and run.theory is not None:
        best = fastest_batch(pace.latency_s, workers * pace.samples_per_s, run.theory.noise_scale)
        most, why = round(best), "the fastest batch at launch.pace and the noise scale of theory"
    else:
        controller = run.model_copy(
            update={"growth": Matched(start=start), "lr": LR(base=1.0, decay=run.lr.decay), "stages": Stages()}
        ).controller(workers)
        assert isinstance(controller.growth, Matched)
        most, why = controller.growth.cap or start, "as large as suits the budget"
    unit = workers * (wish.micro or 1)
    unit = unit if unit <= most else workers
    return max(start, most // unit * unit), why


def _in_steps(scaled: _Scaled, steps: int, critical: int | None) -> Proposal:
    """Return the schedule of so many updates: the smallest b₀ and cap that make so few, and hold for the rest.

    Where lr.decay begins, batches stop to grow. So a hold that is a little longer may keep a batch from growing at all.
    """
    widest = scaled.rounded_down(min(scaled.run.task.train_size(), scaled.samples))
    start = _start(scaled, steps, widest)
    caps = range(start, max(start, widest) + 1, scaled.unit)
    cap = caps[min(_first(caps, lambda cap: scaled.updates(start, cap) <= steps), len(caps) - 1)]
    enough = min(_first(range(FINEST), lambda part: scaled.updates(start, cap, part / FINEST) >= steps), FINEST - 1)
    near = (max(0, enough - 1) / FINEST, enough / FINEST)
    hold = min(near, key=lambda part: abs(scaled.updates(start, cap, part) - steps))
    why = f"for {counted(steps, 'update')}"
    if critical is not None and cap > critical:
        why += f", beyond the critical batch of {critical} that probe-batch found"
    return scaled.proposal(start, cap, hold, why)


def _start(scaled: _Scaled, steps: int, widest: int) -> int:
    """Return the b₀ from which growth comes to so many updates: the run's, if it does."""
    samples, start = scaled.samples, scaled.rounded_up(scaled.rates.batch)
    if math.ceil(samples / start) < steps:
        start = scaled.rounded_down(samples / steps)
        if start == 0:
            raise ConfigError(
                f"--steps={steps}: {samples:,} samples in so many updates are less than a row for each of "
                f"{counted(scaled.unit, 'worker')}; ask for at most {samples // scaled.unit:,}"
            )
        return start
    starts = range(start, scaled.most_start() + 1, scaled.unit)
    found = _first(starts, lambda start: scaled.updates(start, max(start, widest)) <= steps)
    if found == len(starts):
        last = starts[-1]
        fewest = scaled.updates(last, max(last, widest))
        raise ConfigError(
            f"--steps={steps}: with {samples:,} samples the fewest updates are {fewest:,}, from b₀ {last} on at lr "
            f"{scaled.lr(last):.4g}, as a run may take at most {scaled.rates.largest:.4g}; ask for more, or lower "
            "the budget"
        )
    return starts[found]


def _first(values: range, holds: Callable[[int], bool]) -> int:
    """Return the index of the first value for which something holds from there on; their number if for none."""
    return bisect_left(values, True, key=holds)


def probed_batch(folder: Path) -> int | None:
    """Return the critical batch that probe-batch has left in a run's folder, by its newest checkpoint; None: none.

    Of the answers by training and by test loss it is the smaller one.
    """
    files = sorted(folder.glob("probe-batch-step-*.jsonl"))
    for file in reversed(files):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = [line[key] for line in lines for key in ("training_batch", "test_batch") if key in line]
        if found:
            return min(found)
    return None
