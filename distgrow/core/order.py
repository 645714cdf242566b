"""Order: position in the endless sample stream → (epoch, shuffled index), by arithmetic in O(1) memory.

Each epoch is a keyed bijection of 0 … n−1: an alternating Feistel network over a × b ≥ n cells, a and b both about √n,
with cycle walking back into the range (Black & Rogaway 2002). Nothing of size n is ever made.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distgrow.core.errors import ConfigError

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ONE, _27, _30, _31, _M1, _M2 = (np.uint64(number) for number in (1, 27, 30, 31, _FIRST, _SECOND))


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Shuffle endless passes over `n` samples: each sample once a pass, a new shuffle every pass."""

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 2**62:
            raise ConfigError(f"n={self.n} samples: an order needs at least 1 (and at most 2**62)")

    def __call__(self, positions: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return (epochs, indices) of stream positions ≥ 0, as int64 arrays of the same shape."""
        where = np.asarray(positions, dtype=np.int64)
        epochs, offsets = np.divmod(where.reshape(-1), self.n)
        keys = mix(epochs.astype(np.uint64) ^ _base(self.seed, _GOLDEN))
        indices = self._walk(offsets.astype(np.uint64), keys).astype(np.int64)
        return epochs.reshape(where.shape), indices.reshape(where.shape)

    def _walk(self, values: UInt64s, keys: UInt64s) -> UInt64s:
        values = self._feistel(values, keys)
        outside = np.flatnonzero(values >= np.uint64(self.n))
        while outside.size:
            values[outside] = self._feistel(values[outside], keys[outside])
            outside = outside[values[outside] >= np.uint64(self.n)]
        return values

    def _feistel(self, values: UInt64s, keys: UInt64s) -> UInt64s:
        """Apply a keyed bijection of the numbers below a·b ≥ n: each half of left·b + right is rotated by the other."""
        height = math.isqrt(self.n - 1) + 1
        width = -(-self.n // height)
        a, b = np.uint64(height), np.uint64(width)
        left, right = np.divmod(values, b)
        for turn in range(4 if self.n > 256 else 12):  # with halves of a bit or two, four mix visibly less than chance
            left = (left + (mix(right ^ (keys + _turn_key(2 * turn))) >> _ONE)) % a
            right = (right + (mix(left ^ (keys + _turn_key(2 * turn + 1))) >> _ONE)) % b
        return left * b + right


def _turn_key(turn: int) -> np.uint64:
    return np.uint64(turn * _GOLDEN % 2**64)


def _base(seed: int, salt: int) -> UInt64s:
    """Return one well-mixed number of a seed of any size, as an array that broadcasts."""
    return mix(np.array([(seed * _GOLDEN + salt) % 2**64], np.uint64))


def mix(values: UInt64s) -> UInt64s:
    """Return 64 well-mixed bits for each value by SplitMix64's finaliser (Steele, Lea & Flood 2014)."""
    z = values ^ (values >> _30)
    z *= _M1
    z ^= z >> _27
    z *= _M2
    z ^= z >> _31
    return z


def mix_int(seed: int, number: int) -> int:
    """Return a 63-bit random seed for two integers, by SplitMix64's finaliser as in `mix`."""
    z = (seed * _GOLDEN + number + 1) * _GOLDEN % 2**64
    z = (z ^ (z >> 30)) * _FIRST % 2**64
    z = (z ^ (z >> 27)) * _SECOND % 2**64
    return (z ^ (z >> 31)) >> 1


def seeds(seed: int, positions: npt.ArrayLike) -> UInt64s:
    """Return one 64-bit seed per stream position. A sample's augmentation follows from it alone."""
    numbers = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    return mix((numbers + _ONE) * np.uint64(_GOLDEN) ^ _base(seed, 0x5851F42D4C957F2D))
