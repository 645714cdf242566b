"""Result: what a run ended with."""

from dataclasses import dataclass
from pathlib import Path

from distgrow.core.counted import counted
from distgrow.core.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Result:
    """Hold what a run ended with."""

    progress: Progress
    metrics: dict[str, float]  #: of the test set; empty without one or if the run was stopped early
    finished: bool  #: False: a request stopped it, or a group of another size goes on with it; after a checkpoint
    dir: Path  #: the run's folder
    reason: str = "done"  #: why it ended: the budget is spent ("done"), or what a hook or a request gave

    def __repr__(self) -> str:
        """Return a line: what has been done, and the metrics. `progress` has all counts."""
        progress, metrics = self.progress, "".join(f", {name}={value:.6g}" for name, value in self.metrics.items())
        state = "finished" if self.finished else "stopped, to be resumed"
        done = (
            f"{counted(progress.step, 'update')}, {counted(progress.samples, 'sample')}, "
            f"{counted(progress.ledger.total, 'gradient evaluation')}"
        )
        return f"<Result: {state}, {done}{metrics}>"
