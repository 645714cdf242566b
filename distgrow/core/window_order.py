"""WindowOrder: position in the endless sample stream → (epoch, row), for rows that lie in pieces that are read whole.

Each epoch shuffles the pieces, lays them end to end, cuts the line into windows and shuffles the rows of each window.
So the rows of a window come from few pieces. Memory grows with the number of pieces, never with that of rows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, Order, mix_int

_PIECES, _ROWS, _LAST = 1, 2, 3  # salts of three kinds of keys


@dataclass(frozen=True, kw_only=True)
class WindowOrder:
    """Shuffle endless passes over rows in pieces: each row once a pass, a new shuffle every pass."""

    sizes: tuple[int, ...]  #: rows of each piece; rows are numbered through, piece after piece
    window: int  #: rows that are shuffled together
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"window={self.window}: rows are shuffled in windows of at least 1")
        if self.n < 1:
            raise ConfigError("an order needs at least 1 row; all pieces are empty")

    @cached_property
    def n(self) -> int:
        """Return the rows of a pass."""
        return sum(self.sizes)

    @cached_property
    def _first(self) -> Int64s:
        """The number of each piece's first row."""
        return np.cumsum(self._sizes) - self._sizes

    @cached_property
    def _sizes(self) -> Int64s:
        return np.asarray(self.sizes, np.int64)

    @cached_property
    def _lines(self) -> dict[int, tuple[Int64s, Int64s]]:
        """The lines of the last passes that were asked for."""
        return {}

    def __call__(self, positions: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return (epochs, rows) of stream positions ≥ 0, as int64 arrays of the same shape."""
        where = np.asarray(positions, dtype=np.int64)
        epochs, offsets = np.divmod(where.reshape(-1), self.n)
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._rows(epoch, offsets[here])
        return epochs.reshape(where.shape), rows.reshape(where.shape)

    def _rows(self, epoch: int, offsets: Int64s) -> Int64s:
        """Return the rows at the offsets of a pass."""
        pieces, ends = self._line(epoch)
        places = self._places(mix_int(self.seed, epoch), offsets)
        k = np.searchsorted(ends, places, side="right")
        begins = ends[k] - self._sizes[pieces[k]]
        return self._first[pieces[k]] + places - begins

    def _places(self, key: int, offsets: Int64s) -> Int64s:
        """Shuffle the offsets of a pass within their windows. The last window may be shorter."""
        whole = self.n - self.n % self.window
        places = np.empty_like(offsets)
        if (inside := offsets < whole).any():
            numbers, places_in = Order(n=self.window, seed=mix_int(key, _ROWS))(offsets[inside])
            places[inside] = numbers * self.window + places_in
        if not inside.all():
            places[~inside] = whole + Order(n=self.n - whole, seed=mix_int(key, _LAST))(offsets[~inside] - whole)[1]
        return places

    def _line(self, epoch: int) -> tuple[Int64s, Int64s]:
        """Return the shuffled pieces of a pass, and where each of them ends if they are laid end to end."""
        if epoch not in self._lines:
            while len(self._lines) > 1:
                self._lines.pop(min(self._lines))
            key = mix_int(mix_int(self.seed, _PIECES), epoch)
            pieces = Order(n=len(self.sizes), seed=key)(np.arange(len(self.sizes)))[1]
            self._lines[epoch] = pieces, np.cumsum(self._sizes[pieces])
        return self._lines[epoch]
