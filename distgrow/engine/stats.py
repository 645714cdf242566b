"""What ranks tell each other about one update beside its gradient, and what has become of that; knows no engine."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from distgrow.core.errors import TrainingFailed
from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.noise.hooks import Sums

#: Votes that an update can carry.
MAX_VOTES = 4
#: Tokens are sent as multiples of this and the rest, as float32 holds whole numbers up to 2^24 alone.
LOW = 2**12
#: A learning rate that nothing moves by, in float32.
_NO_LR = 1e-30


class UpdateStats(NamedTuple):
    """Hold one rank's part of an update's statistics or, once they are reduced, the means over ranks."""

    loss: Tensor | float = 0.0  #: its part of the mean loss
    micro_sq: Tensor | float = 0.0  #: its term of Σ n_i|g_i|²/B over micro-batches; 0 unless `measured`
    measured: float = 0.0  #: 1: `micro_sq` is known
    failed: float = 0.0  #: 1: memory did not hold its part, so nobody may apply the update
    batch: float = 0.0  #: what the plan tells of it
    lr: float = 0.0  #: the plan's
    weight: float = 0.0  #: of its losses, together; with items, what gradient and loss are to be divided by
    parts: float = 0.0  #: its micro-batches, but for those without items
    tokens: tuple[float, float] = (0.0, 0.0)  #: of its micro-batches: multiples of LOW, and the rest
    votes: tuple[float, ...] = ()  #: 1 for every vote that is cast

    def pack(self) -> list[Tensor | float]:
        """Return SIZE numbers, of which only the first two may be tensors."""
        votes = [*self.votes, *[0.0] * (MAX_VOTES - len(self.votes))]
        return [
            self.loss,
            self.micro_sq,
            self.measured,
            self.failed,
            self.batch,
            self.lr,
            self.weight,
            self.parts,
            *self.tokens,
            *votes,
        ]

    @classmethod
    def unpack(cls, values: Sequence[float], votes: int) -> "UpdateStats":
        """Return the stats that were packed, with the first `votes` of the votes that can be carried."""
        loss, micro_sq, measured, failed, batch, lr, weight, parts, high, low, *cast = values
        return cls(loss, micro_sq, measured, failed, batch, lr, weight, parts, (high, low), tuple(cast[:votes]))

    def all_tokens(self, ranks: int) -> int:
        """Return the tokens of all ranks, whose mean these stats are; 0 if a count was no whole number."""
        if not any(self.tokens):
            return 0
        if not all(map(math.isfinite, self.tokens)):
            return 0
        high, low = (round(part * ranks) for part in self.tokens)
        return high * LOW + low

    def over_items(self) -> "UpdateStats":
        """Return the stats with means over the items of all ranks; NaN if there were none."""
        share = 1 / self.weight if self.weight else math.nan
        return self._replace(loss=self.loss * share, micro_sq=self.micro_sq * share)

    def read(self) -> "UpdateStats":
        """Return the stats of the only rank, which are the means already, as plain numbers. Waits for a GPU."""
        return self._replace(loss=float(self.loss), micro_sq=float(self.micro_sq))

    def numbers(self) -> list[float]:
        """Return the packed stats as plain numbers. Waits for a GPU."""
        return [float(value) for value in self.pack()]


class Applied(NamedTuple):
    """Hold what has become of an update's gradient."""

    stats: UpdateStats  #: means over ranks
    grad_norm: float
    applied: bool
    metric_sq: float | None = None  #: |g|² in the metric of the optimizer's steps, before clipping, if it was asked for
    average: float | None = None  #: weight of the parameters in their average; None: what the plan says
    out_of_memory: bool = False  #: a rank had no memory for its part
    products: Sums | None = None  #: of the step, over all shards; None: those that were looked at last, of this rank's


#: The place of the weight in packed stats.
WEIGHT = UpdateStats._fields.index("weight")
#: The places in packed stats of what is added up over ranks: the others are means.
ADDED = [1, 7, 8, 9]
#: Makes a rank's stats from the weighted loss of its last micro-batch, once backward has come to all gradients.
MakeStats = Callable[[Tensor], UpdateStats]
#: Numbers of packed stats.
SIZE = len(UpdateStats().pack())


def check_agreed(plan: Plan, stats: UpdateStats, world: World) -> None:
    """Check that the means over ranks of the batch and the learning rate are this rank's own.

    If they are not, gradients were weighted wrongly, and from here on samples would be repeated or lost. Of many ranks
    those that agree may not see it, as float32 rounds a sum of so many; the odd one does, and the others miss it then.

    Raises:
        TrainingFailed: They are not.
    """
    rounding = (3 + world.size) * 2**-22
    batch, lr = stats.batch, stats.lr
    if abs(batch - plan.told) > rounding * plan.told or abs(lr - plan.lr) > rounding * plan.lr + _NO_LR:
        raise TrainingFailed(
            f"rank {world.rank} is at batch {plan.told} and lr {plan.lr:g}, where the mean over ranks is {batch:g} "
            f"and {lr:g}: they have not decided alike; go on with --resume"
        )
