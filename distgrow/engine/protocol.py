"""Engine: what computes gradients and steps, as the training loop sees it; importing this loads no torch."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Withdrawn

if TYPE_CHECKING:
    from distgrow.engine.functional import FunctionalObjective


class Engine(Protocol):
    """All that computes: parameters, gradients, optimizer state."""

    evaluations: int
    """Per-sample gradient evaluations that this rank has really made, counted from the data."""

    groups: list[str]
    """A line for each group of parameters; none if all train alike."""

    ahead: int
    """1: `update` tells what the update before gave, as the host does not wait for the present one; 0: at once."""

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """Accumulate, reduce, clip, step. Collective: every rank must call.

        A gradient that is not finite is not applied, nor one that a rank had no memory for: parameters, buffers and
        the optimizer's state are then what they were. `votes` are this rank's wishes; the outcome tells which of
        them any rank had.
        """
        ...

    def last(self) -> tuple[Plan, Outcome] | None:
        """Return the last update and what it gave, unless an `update` has told it; else None. Collective."""
        ...

    def drain(self) -> bool:
        """Apply every gradient in flight, in order, as the run is over. Return whether there was any. Collective."""
        ...

    def withdrawn(self) -> Withdrawn | None:
        """Return what has become of updates otherwise than they were counted, since it was last told; None: nothing."""
        ...

    def settings(self, plan: Plan) -> dict[str, float]:
        """Return the optimizer's settings that follow the batch, as they are at an update, by the keys of AtGrowth."""
        ...

    def parameter_noise(self) -> dict[str, tuple[float, float]]:
        """Return |∇f|² and tr Σ of each parameter by its name, NaN where they are not known; empty: not measured."""
        ...

    def evaluate(self, batches: Iterable[tuple[Any, int]]) -> dict[str, float]:
        """Means over all ranks' (batch, rows of it that count), in eval mode. Collective: every rank must call.

        Every rank has as many batches.
        """
        ...

    def at_average(self) -> AbstractContextManager[bool]:
        """Give the model the average of its parameters inside the context. Yield False if there is none. Collective."""
        ...

    def functional(self) -> "FunctionalObjective":
        """Return the objective at the present parameters, in eval mode. Using it moves no parameter. Collective."""
        ...

    def snapshot(self) -> dict[str, bytes]:
        """Parameters, buffers and optimizer state as they are now: the files that this rank has to keep. Collective."""
        ...

    def load(self, folder: Path) -> None:
        """Read the files of all ranks' snapshots, on any number of ranks; executes no code from them. Collective."""
        ...

    def close(self) -> None:
        """Give the model back whole, without hooks; the engine is of no use afterwards. Collective."""
        ...
