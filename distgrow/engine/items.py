"""Items: what a loss is a mean over if that is not rows, and how a micro-batch weighs by them; knows no engine."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.engine.batches import Loss

#: Counts what a micro-batch's loss is a mean over: tokens that are no padding, for example, or the sum of weights.
Items = Callable[[Any], Any]
#: Tokens of every sample, or what counts those of a collated batch.
Tokens = int | Items


def count_items(items: Items, batch: Any, name: str = "items") -> float:
    """Return what a collated batch counts: 0 or a positive number.

    Raises:
        ConfigError: It is no such number.
    """
    counted = items(batch)
    try:
        if isinstance(counted, str):
            raise TypeError
        count = float(counted)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(counted.shape)}" if isinstance(counted, Tensor) else ""
        raise ConfigError(
            f"{name} returned a {type(counted).__name__}{shape} for a micro-batch; it must return one number, what the "
            "loss is a mean over, such as int((labels != -100).sum())"
        ) from None
    if not 0 <= count < math.inf:
        raise ConfigError(f"{name} returned {count} for a micro-batch; it must return 0 or a positive number")
    return count


class Weights:
    """Weigh one rank's micro-batches of one update.

    By rows, the weighted losses averaged over ranks are the mean over the batch. By items, the mean is theirs divided
    by the mean of `total` over ranks, which is known at the end alone.
    """

    def __init__(self, plan: Plan, items: Items | None, tokens: Tokens | None = None) -> None:
        self._plan, self._items, self._tokens = plan, items, tokens
        self.total = 0.0  #: Σ of the weights given so far
        self.parts = 0  #: micro-batches that have items
        self.tokens = 0.0  #: of the micro-batches so far; NaN if a count was no whole number

    def of(self, batch: Any, rows: int) -> float:
        """Return the factor of a micro-batch's mean loss; 0 if it counts nothing, and so has no mean loss."""
        plan = self._plan
        if not rows:
            return 0.0
        count = float(rows) if self._items is None else count_items(self._items, batch)
        self.tokens += self._tokens_of(batch, rows, count)
        if self._items is None or plan.probe:
            weight = plan.weight(rows)
        elif count:
            weight = 1.0 if plan.parts == 1 else count * plan.world / plan.batch
        else:
            return 0.0
        self.parts += 1
        self.total += weight
        return weight

    def _tokens_of(self, batch: Any, rows: int, items: float) -> float:
        """Return the tokens of a micro-batch, 0 if nobody counts them, NaN if the count is no whole number."""
        if self._tokens is None:
            return 0.0
        if isinstance(self._tokens, int):
            return float(self._tokens * rows)
        if self._tokens is self._items:
            return items if items.is_integer() else math.nan
        count = count_items(self._tokens, batch, "tokens")
        if not count.is_integer():
            raise ConfigError(f"tokens returned {count} for a micro-batch; tokens are whole numbers")
        return count


def mean_loss(loss: Loss, items: Items | None) -> Callable[[nn.Module, Any], Mapping[str, Any]]:
    """Return the metric of an evaluation that has no other: the mean loss over rows, or over items."""
    if items is None:
        return lambda model, batch: {"loss": loss(model, batch)}

    def over_items(model: nn.Module, batch: Any) -> Mapping[str, Any]:
        value, count = loss(model, batch), count_items(items, batch)
        return {"loss": (value * count if count else 0.0, count)}

    return over_items
