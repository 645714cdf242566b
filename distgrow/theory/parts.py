"""Parts of a training set, and how a batch is spread over parts and samples, for the formulas of samplings.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distgrow.theory.numbers import Array, check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Hold the constants of one part of the training set, or of all of it as the only part.

    L_j ≤ max L_i ≤ n_j·L_j and ‖G_j‖² ≤ h̄_j must hold, up to rounding, as they do for convex f_i.

    Source: after Alfarra et al. 2020, arXiv 2005.01097.
    """

    smoothness: float
    """L_j of the part's mean loss."""
    each: Sequence[float]
    """L_i of each sample's loss."""
    squares: Sequence[float]
    """h_i of each sample, gradient²."""
    mean_sq: float = 0.0
    """‖G_j‖², gradient²; 0 if the part is the whole training set."""
    samples: int = field(init=False)
    largest: float = field(init=False)
    optimum_sq: float = field(init=False)

    def __post_init__(self) -> None:
        check_positive(smoothness=self.smoothness, each=self.each)
        if not len(self.each) or len(self.each) != len(self.squares):
            raise ValueError(f"each has {len(self.each)} numbers and squares {len(self.squares)}: one for each sample")
        object.__setattr__(self, "samples", len(self.each))
        object.__setattr__(self, "largest", float(max(self.each)))
        object.__setattr__(self, "optimum_sq", float(np.mean(self.squares)))
        most = self.samples * self.smoothness
        if not self.smoothness * (1 - 1e-9) <= self.largest <= most * (1 + 1e-9):
            raise ValueError(f"max(each)={self.largest} must lie between smoothness={self.smoothness} and {most}")
        if min(self.squares) < 0 or not 0 <= self.mean_sq <= self.optimum_sq * (1 + 1e-9):
            raise ValueError(f"mean_sq={self.mean_sq} must lie between 0 and the mean of squares, {self.optimum_sq}")

    def odds(self, weights: Sequence[float] | None, batch: int) -> Array:
        """Return (1 − p_i)/p_i of the samples for `inclusion` by `weights`, or by equal ones."""
        chances = inclusion([1.0] * self.samples if weights is None else weights, batch)
        return (1 - chances) / chances

    def mixed(self, batch: int, together: float, alone: float) -> float:
        """Return [n(τ−1)·together + (n−τ)·alone] / (τ(n−1)) for the part's n samples; `together` for n = 1."""
        n = self.samples
        return together if n == 1 else (n * (batch - 1) * together + (n - batch) * alone) / (batch * (n - 1))

    def left(self, batch: int) -> float:
        """Return (n−τ)/(τ(n−1)) for the part's n samples; 0 for τ = n."""
        n = self.samples
        return (n - batch) / (batch * (n - 1)) if batch < n else 0.0


def inclusion(weights: Sequence[float], batch: float) -> Array:
    """Return p_i proportional to `weights` with Σp_i = τ, but for those that would be above 1, which are 1.

    Source: derived for this project.
    """
    check_positive(weights=weights, batch=batch)
    rest, chances = np.asarray(weights, float), np.ones(len(weights))
    if batch > len(rest):
        raise ValueError(f"batch={batch} is more than the {len(rest)} samples")
    free = np.ones(len(rest), bool)
    while free.any():
        share = (batch - (~free).sum()) * rest[free] / rest[free].sum()
        chances[free] = np.minimum(share, 1.0)
        if (share <= 1).all():
            break
        free[free] = share < 1
    return chances


def shares(sizes: Sequence[int], batch: int) -> list[int]:
    """Return τ_j near τ·n_j/n that sum to τ: at least 1, at most n_j, the largest remainders rounded up.

    Source: elementary.
    """
    if not len(sizes) <= batch <= sum(sizes):
        raise ValueError(f"batch={batch} must lie between the number of parts, {len(sizes)}, and n={sum(sizes)}")
    exact = [batch * size / sum(sizes) for size in sizes]
    counts = [min(size, max(1, batch * size // sum(sizes))) for size in sizes]
    while (left := batch - sum(counts)) != 0:
        step = 1 if left > 0 else -1
        movable = [j for j, n in enumerate(counts) if 1 <= n + step <= sizes[j]]
        counts[max(movable, key=lambda j: step * (exact[j] - counts[j]))] += step
    return counts
