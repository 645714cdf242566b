"""How many experts are active along a run, and what that costs, as arithmetic on the samples axis; knows no model."""

from dataclasses import dataclass

from distgrow.core.lr import Span
from distgrow.core.progress import Progress
from distgrow.core.spec import PosInt, Spec


class ActiveExperts(Spec):
    """How many experts a token uses, rising or falling linearly over the budget's samples."""

    start: PosInt
    """Active experts at the first update."""
    end: PosInt
    """Active experts at the end. Each number from start to end has an equal share of the samples."""

    @property
    def most(self) -> int:
        """Return the largest number that the run comes to."""
        return max(self.start, self.end)

    def at(self, progress: Progress, axis: Span) -> int:
        """Return the active experts of the update that begins at `progress`, of a run along `axis`."""
        span = abs(self.end - self.start)
        moved = min(span, (span + 1) * progress.ledger.applied // axis.samples)
        return self.start + (moved if self.end > self.start else -moved)

    def held(self, progress: Progress, axis: Span) -> "ActiveExperts":
        """Return the schedule that keeps to the number at `progress`."""
        now = self.at(progress, axis)
        return ActiveExperts(start=now, end=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Count the weights of a model with experts: those of the kernels of its blocks, as compute goes by them."""

    shared: int  #: that every token uses
    each: int  #: of one expert, in all blocks together
    experts: int  #: in each block
    active: ActiveExperts  #: of a token, from the beginning of the run to its end

    def share(self, active: float) -> float:
        """Return the share of the weights that a token uses if so many experts are active."""
        return (self.shared + active * self.each) / (self.shared + self.experts * self.each)

    def at(self, progress: Progress, axis: Span) -> float:
        """Return the share of the update that begins at `progress`, of a run along `axis`."""
        return self.share(self.active.at(progress, axis))

    @property
    def average(self) -> float:
        """Return the mean share along the samples of the run: each number of experts has equally many of them."""
        return self.share((self.active.start + self.active.end) / 2)
