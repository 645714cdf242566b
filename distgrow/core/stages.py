"""Stages: where they end and how long they are. Pure, and independent of batch sizes.

Stage boundaries are absolute positions on the axis of samples or of steps. If a batch passes a boundary, the error
therefore never adds up.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.lr import Decay, Span
from distgrow.core.spec import PosFloat, PosInt, Spec, at_least, by_position, one_of

#: Samples of the longest run: positions of the sample stream are 64-bit integers.
LONGEST = 2**62

#: Why a length in tokens is none in samples.
NOT_FIXED = (
    "needs samples of as many tokens each: give tokens=…, their number, to fit() or Task (task.tokens of a target), or "
    "give samples"
)

Axis = Literal["samples", "steps"]


class Trigger(Protocol):
    """Tell where stages end. `end` never falls from one stage to the next."""

    @property
    def axis(self) -> Axis: ...

    def end(self, stage: int) -> float:
        """Return the first position on the axis at which `stage` is over, or inf if it never is."""
        ...


def stage_at(trigger: Trigger, stage: int, position: int, last: float) -> int:
    """Return the stage at `position` on the trigger's axis: `stage` or a later one, never beyond `last`."""
    while stage < last and trigger.end(stage) <= position:
        stage += 1
    return stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometric:
    """Make stage m first·ratio^m long. Ratio 1 makes all stages equal."""

    axis: Axis
    first: float
    ratio: float = 1.0

    def end(self, stage: int) -> float:
        try:
            if self.ratio == 1.0:
                return at_least(self.first * (stage + 1))
            return at_least(self.first * (self.ratio ** (stage + 1) - 1) / (self.ratio - 1))
        except OverflowError:
            return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """End stage m at ends[m]. The last stage never ends."""

    axis: Axis
    ends: tuple[int, ...]

    def end(self, stage: int) -> float:
        return self.ends[stage] if stage < len(self.ends) else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """End stage m when the decay has fallen to level(m), or never if that is at the end of the run."""

    decay: Decay
    span: Span
    level: Callable[[int], float]
    axis: Axis = field(default="samples", init=False)

    def end(self, stage: int) -> float:
        level = self.level(stage) * (1 + 1e-9)
        last = self.span.samples
        if level == 0 or self.decay.fall(last, self.span) > level:
            return math.inf
        end = bisect_left(range(last), True, key=lambda samples: self.decay.fall(samples, self.span) <= level)
        return end if end < last else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Later:
    """End stage m when it is over by both of two triggers on the samples axis."""

    one: Trigger
    other: Trigger
    axis: Axis = field(default="samples", init=False)

    def __post_init__(self) -> None:
        assert self.one.axis == self.other.axis == self.axis

    def end(self, stage: int) -> float:
        return max(self.one.end(stage), self.other.end(stage))


def interval(tokens: int, each: int | None, key: str) -> int:
    """Return the fewest samples that have so many tokens, if each has `each`. Raise ConfigError if that is None."""
    if each is None:
        raise ConfigError(f"{key}={tokens} {NOT_FIXED}")
    return -(-tokens // each)


# ── stage lengths and budgets ───────────────────────────────────────────────────────────────────────────────────


class Every(Spec):
    """The length of a stage, or the lengths of all but the last."""

    epochs: PosFloat | Annotated[list[PosFloat], Field(min_length=1)] | None = None
    """Passes over the training set."""
    samples: PosInt | Annotated[list[PosInt], Field(min_length=1)] | None = None
    """Samples."""
    steps: PosInt | Annotated[list[PosInt], Field(min_length=1)] | None = None
    """Updates."""
    tokens: PosInt | Annotated[list[PosInt], Field(min_length=1)] | None = None
    """Tokens, if every sample has as many; a stage ends with the sample that reaches them."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Every":
        one_of(self, "epochs", "samples", "steps", "tokens")
        return self

    def in_samples(self, tokens: int | None) -> "Every":
        """Return the lengths in samples, if they are in tokens, of which every sample has `tokens`.

        Raises:
            ConfigError: That is not known.
        """
        if self.tokens is None:
            return self
        if isinstance(self.tokens, int):
            return Every(samples=interval(self.tokens, tokens, "stages.every.tokens"))
        ends = [interval(end, tokens, "stages.every.tokens") for end in accumulate(self.tokens)]
        return Every(samples=[end - before for before, end in zip([0, *ends], ends, strict=False)])

    def lengths(self, epoch: int) -> tuple[Axis, list[float]]:
        """Return the axis and the lengths on it. Raise ConfigError if a stage would be shorter than one sample."""
        unit = one_of(self, "epochs", "samples", "steps", "tokens")
        if unit == "tokens":
            raise ConfigError(f"stages.every.tokens={self.tokens} {NOT_FIXED}")
        value = getattr(self, unit)
        values = value if isinstance(value, list) else [value]
        lengths = [v * epoch if unit == "epochs" else v for v in values]
        if min(lengths) < 1:
            raise ConfigError(f"stages.every.{unit}={value} makes a stage shorter than one sample; make it longer")
        if math.fsum(lengths) > LONGEST:
            raise ConfigError(f"stages.every.{unit}={value} is longer than any run (2**62 samples); make it shorter")
        return ("steps" if unit == "steps" else "samples"), lengths


class Stages(Spec):
    """How long stages are."""

    every: Every = Every(epochs=5)
    """Length of each stage: {epochs: …}, {samples: …} or {steps: …}; a list gives each stage its own."""
    power: Annotated[float, Field(ge=0, le=16)] = 0.0
    """Stage m is e₀·δ^(power·m) long, δ = growth.factor; 0 makes all stages equal."""

    def trigger(self, ratio: float, epoch: int) -> Trigger:
        """Return the boundaries of stages that are each `ratio` times as long as the one before."""
        axis, lengths = self.every.lengths(epoch)
        unit = one_of(self.every, "epochs", "samples", "steps", "tokens")
        if not isinstance(getattr(self.every, unit), list):
            return Geometric(axis=axis, first=lengths[0], ratio=ratio)
        if ratio != 1.0:
            raise ConfigError(f"stages.power={self.power} and a list of lengths in stages.every: give one of them")
        ends = accumulate(map(Fraction, lengths))  # exact, and rounded once, as fsum of each would be
        return Listed(axis=axis, ends=tuple(at_least(float(end)) for end in ends))


class MinStage(Spec):
    """How long a stage of adaptive growth is at least, so that what it measures can settle."""

    epochs: PosFloat | None = None
    """Passes over the training set."""
    samples: PosInt | None = None
    """Samples. Give at most one of the two; of neither, `updates` alone counts."""
    updates: PosInt = 20
    """Updates that have shown what the growth goes by."""

    @model_validator(mode="after")
    def _one_unit(self) -> "MinStage":
        if self.epochs is not None and self.samples is not None:
            raise ConfigError(f"epochs={self.epochs} and samples={self.samples}: give at most one of them")
        return self

    def length(self, epoch: int) -> int:
        """Return the length in samples."""
        return self.samples or at_least(min((self.epochs or 0.0) * epoch, LONGEST))

    def over(self, samples: int, updates: int, epoch: int) -> bool:
        """Return whether a stage of so many samples and measured updates is long enough."""
        return samples >= self.length(epoch) and updates >= self.updates

    def least(self, batch: int, epoch: int) -> int:
        """Return the fewest samples after which it can be over, in whole updates of `batch` that are all measured."""
        return batch * max(self.updates, -(-self.length(epoch) // batch))


min_stage = by_position(MinStage)


def every(
    *,
    epochs: float | list[float] | None = None,
    samples: int | list[int] | None = None,
    tokens: int | list[int] | None = None,
    steps: int | list[int] | None = None,
    power: float = 0.0,
) -> Stages:
    """Return stages of equal length, or of the lengths in a list; each δ^power times as long as the one before."""
    return Stages(every=Every(epochs=epochs, samples=samples, tokens=tokens, steps=steps), power=power)
