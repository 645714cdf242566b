"""RateTest: how long the short runs are that measure the first learning rate, and where they begin. Plain numbers."""

from typing import Annotated

from pydantic import Field

from distgrow.core.spec import PosFloat, Spec

#: Updates of a short run that measures η₀, by default, and the fewest that show whether it diverges.
UPDATES, LEAST_UPDATES = 200, 20
#: Powers of 2 that are tried above and below the first rate, at most, and rates that this may come to.
MOST_POWER = 10
MOST_RATES = MOST_POWER + 1
#: Samples whose mean loss is that of the first weights, at least.
FIRST = 64
#: Part of the budget that measuring `base: auto` takes at most, unless it says how long.
SHARE = 0.1

#: Short runs of fewer updates than this miss more instabilities.
FEW_UPDATES = 100


def margin(updates: int) -> int:
    """Return what the largest rate that short runs of so many updates bear is divided by, at least.

    A long run often fails at a rate that a short one bears: see docs/probes.md for what was seen.
    """
    return 8 if updates < FEW_UPDATES else 4


def first_updates(batch: int) -> int:
    """Return the updates of the run that moves nothing, which shows the loss of the first weights."""
    return -(-FIRST // batch)


class RateTest(Spec):
    """How `base: auto` is measured: by short runs at b₀, each from the first weights at twice or half the last rate."""

    start: PosFloat | None = None
    """Rate of the first short run. Default: 0.1 for optimizers like SGD, 0.001 for those like Adam, the optimizer's own
    for one that is built already."""
    updates: Annotated[int, Field(ge=LEAST_UPDATES)] | None = None
    """Updates of each short run. Default: 200, or as many as let 11 of them take a tenth of the budget, at least 20."""

    def length(self, total: int, batch: int) -> int:
        """Return the updates of each short run, for a budget of `total` samples and batches of `batch`."""
        if self.updates is not None:
            return self.updates
        return max(LEAST_UPDATES, min(UPDATES, int(SHARE * total / (MOST_RATES * batch))))
