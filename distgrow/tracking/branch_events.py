"""Events of growth by branches: a branch's end, and the verdict of a test with all that it follows from."""

from dataclasses import dataclass
from typing import ClassVar

from distgrow.tracking.base_event import Event
from distgrow.tracking.fields import (
    Amount,
    Count,
    Counts,
    Figures,
    OldAmount,
    OldCount,
    OldFigures,
    Positive,
    Rows,
    Text,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch(Event):
    """Hold that a branch of a test has ended, which may go on or not; `step` and `samples` are where it began."""

    kind: ClassVar[str] = "branch"

    batch: Positive
    lr: Amount  #: of its first update
    evaluations: Count  #: of this and earlier branches of the test


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchTest(Event):
    """Hold which branch of a test goes on, and all that this follows from; the policy's limits are in `more`.

    Lists have an entry for each branch. `step` and `samples` are where all of them began.
    """

    kind: ClassVar[str] = "branches"

    epoch: OldAmount = None
    goes_by: Text  #: "training" or "validation" loss
    window: Positive  #: samples of a window
    batches: Counts
    lrs: Figures  #: of the first updates
    losses: Rows  #: mean training loss over each window
    validation: OldFigures = None  #: validation loss at the end
    differences: Figures  #: to the first branch
    errors: Figures  #: standard errors of the differences
    winner: Count  #: its number, from 0
    batch: Positive  #: the winner's
    evaluations: Count  #: of the branches that do not go on
    sfo_probe: OldCount = None
    seconds: OldAmount = None
