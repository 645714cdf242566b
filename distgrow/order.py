"""Order: position in the endless sample stream → (epoch, shuffled index), by arithmetic in O(1) memory.

Each epoch is a keyed bijection of 0 … n−1: an alternating Feistel network over the next power of two, with
cycle walking (Black & Rogaway 2002) back into the range. Nothing of size n is ever made.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distgrow.spec import ConfigError

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Shuffled endless passes over `n` samples, each sample once a pass, a new shuffle every pass."""

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 2**62:
            raise ConfigError(f"n={self.n} samples: an order needs at least 1 (and at most 2**62)")

    def __call__(self, positions: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Positions (any shape, ≥ 0) → (epochs, indices), int64 arrays of the same shape."""
        where = np.asarray(positions, dtype=np.int64)
        epochs, offsets = np.divmod(where.reshape(-1), self.n)
        keys = mix(epochs.astype(np.uint64) ^ mix(np.uint64((self.seed + _GOLDEN) % 2**64)))
        indices = self._walk(offsets.astype(np.uint64), keys).astype(np.int64)
        return epochs.reshape(where.shape), indices.reshape(where.shape)

    def _walk(self, values: UInt64s, keys: UInt64s) -> UInt64s:
        bits = max(2, (self.n - 1).bit_length())
        values = _feistel(values, keys, bits)
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = _feistel(values[outside], keys[outside], bits)
            outside = outside[values[outside] >= self.n]
        return values


def _feistel(values: UInt64s, keys: UInt64s, bits: int) -> UInt64s:
    """A keyed bijection of the numbers below 2**bits; the halves swap their widths every round."""
    low = bits // 2
    for turn in range(8 if bits > 8 else 24):  # with halves of a bit or two, eight rounds mix visibly less than chance
        shift, mask = np.uint64(low), np.uint64((1 << low) - 1)
        left, right = values >> shift, values & mask
        high = bits - low
        noise = mix(right ^ (keys + _turn_key(turn))) & np.uint64((1 << high) - 1)
        values = (right << np.uint64(high)) | (left ^ noise)
        low = high
    return values


def _turn_key(turn: int) -> np.uint64:
    return np.uint64(turn * _GOLDEN % 2**64)


def mix(values: npt.ArrayLike) -> UInt64s:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014), elementwise: 64 well-mixed bits out of 64."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def mix_int(seed: int, number: int) -> int:
    """A 63-bit random seed from two integers; SplitMix64's finaliser, as in `mix`."""
    z = (seed * _GOLDEN + number + 1) * _GOLDEN % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


def seeds(seed: int, positions: npt.ArrayLike) -> UInt64s:
    """One 64-bit seed per stream position: the random numbers of a sample's augmentation follow from it alone."""
    base = mix(np.uint64((seed * _GOLDEN + 0x5851F42D4C957F2D) % 2**64))
    numbers = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    return mix((numbers + np.uint64(1)) * np.uint64(_GOLDEN) ^ base)
