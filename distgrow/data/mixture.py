"""Mixture: several data sets drawn by weights that may change along the samples."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrow.core.errors import ConfigError
from distgrow.core.mixing import MixedOrder, Weight, Weights
from distgrow.core.order import Int64s, UInt64s, mix_int
from distgrow.data.dataset import Gathered, Ordered, check_rows_by_number, facts_of, order_of, rows_of


class Mixture(Gathered, Ordered):
    """Several data sets, each drawn in its own order: every row of one comes once before any comes again.

    Of any samples in a row each set has its share, up to a few samples, whatever the batch.
    """

    def __init__(self, parts: Sequence[tuple[Any, Weight]]) -> None:
        """Mix data sets.

        Args:
            parts: Map-style data sets with their weights, which need not sum to 1: a number, or numbers from given
                samples on, {0: 1.0, 100_000: 0.5}.

        Raises:
            ConfigError: A set has no rows by number, or weights cannot be.
        """
        if not isinstance(parts, list | tuple) or not parts or not all(_is_pair(part) for part in parts):
            raise ConfigError("Mixture takes a list of pairs (data set, weight), such as [(web, 0.7), (books, 0.3)]")
        self.sets, weights = [part[0] for part in parts], [part[1] for part in parts]
        for number, dataset in enumerate(self.sets):
            check_rows_by_number(dataset, f"mixture: set {number}")
            if not hasattr(dataset, "__getitem__"):
                raise ConfigError(f"mixture: set {number} makes whole batches alone; give it a __getitem__")
            if not len(dataset):
                raise ConfigError(f"mixture: set {number} is empty; leave it out")
        self.weights = Weights.of(weights)
        self.sizes = tuple(len(dataset) for dataset in self.sets)
        self._ends = np.cumsum(self.sizes, dtype=np.int64)

    def __len__(self) -> int:
        """Return the rows of all sets together: what an epoch means in a budget."""
        return int(self._ends[-1])

    def order(self, seed: int) -> MixedOrder:
        """See Ordered."""
        orders = tuple(order_of(dataset, mix_int(seed, number)) for number, dataset in enumerate(self.sets))
        return MixedOrder(orders=orders, sizes=self.sizes, weights=self.weights, seed=seed)

    def facts(self) -> dict[str, int]:
        """See Ordered."""
        digest = hashlib.sha256(repr((self.weights, self.sizes)).encode()).digest()
        own = {f"{name} of set {k}": n for k, data in enumerate(self.sets) for name, n in facts_of(data).items()}
        return {"as digest of the mixture's sizes and weights": int.from_bytes(digest[:6], "big"), **own}

    def rows(self, indices: Int64s, seeds: UInt64s) -> list[Any]:
        """See Gathered."""
        numbers = np.searchsorted(self._ends, indices, side="right")
        found: list[Any] = [None] * len(indices)
        for number in np.unique(numbers).tolist():
            where = np.flatnonzero(numbers == number)
            own = indices[where] - (self._ends[number] - self.sizes[number])
            for place, row in zip(where.tolist(), rows_of(self.sets[number], own, seeds[where]), strict=True):
                found[place] = row
        return found


def _is_pair(part: Any) -> bool:
    return isinstance(part, list | tuple) and len(part) == 2
