"""How many experts are active along a run, as arithmetic on the samples axis; knows no model."""

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
