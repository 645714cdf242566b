"""Samplings of a finite sum: smoothness and noise of their gradients, the batch of least cost and its step size.

f is the mean of n samples' f_i, and a batch of τ samples gives f_v = (1/n)Σ v_i f_i with E v = 1. 𝓛: E‖∇f_v(x) −
∇f_v(x*)‖² ≤ 2𝓛(f(x) − f*), loss / parameter². σ = E‖∇f_v(x*)‖², gradient². h_i = ‖∇f_i(x*)‖², and h̄_j its mean in
part j of n_j samples. L_j is the smoothness of the part's mean loss and G_j that loss's gradient at x*. q_j is the
probability of part j, p_i that of sample i. μ (`mu`) is the strong convexity, ε (`epsilon`) the target of E‖x − x*‖².
σ and 𝓛 were derived after the paper, and are tested against every subset of small problems.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distgrow.theory.finite_sum import FiniteSum
from distgrow.theory.numbers import Array, check_positive
from distgrow.theory.parts import Part, shares


class Sampling(Protocol):
    """Describe a way to draw batches.

    Source: after Alfarra et al. 2020, arXiv 2005.01097.
    """

    @property
    def batches(self) -> Sequence[int]:
        """Return the batches τ that can be drawn, samples."""
        ...

    def smoothness_at(self, batch: int) -> float:
        """Return 𝓛(τ)."""
        ...

    def noise_at(self, batch: int) -> float:
        """Return σ(τ)."""
        ...


@dataclass(frozen=True, slots=True)
class Nice:
    """Draw every subset of τ samples alike.

    Source: Alfarra et al. 2020, arXiv 2005.01097.
    """

    constants: FiniteSum

    @property
    def batches(self) -> Sequence[int]:
        """Return 1 … n."""
        return range(1, self.constants.samples + 1)

    def smoothness_at(self, batch: int) -> float:
        """Return 𝓛(τ) = [n(τ−1)L + (n−τ)L_max] / (τ(n−1))."""
        return self.constants.expected_smoothness(float(batch))

    def noise_at(self, batch: int) -> float:
        """Return σ(τ) = (n−τ)h̄ / (τ(n−1))."""
        return self.constants.optimum_noise(float(batch))


@dataclass(frozen=True, slots=True)
class Independent:
    """Take every sample i into the batch with a probability p_i of its own, Σp_i = τ; v_i = 1/p_i if it is taken.

    The batch's size is random.

    Source: after Alfarra et al. 2020, arXiv 2005.01097.
    """

    whole: Part
    weights: Sequence[float] | None = None
    """What p_i is proportional to, as far as no p_i is above 1. None: all p_i are τ/n."""

    @property
    def batches(self) -> Sequence[int]:
        """Return 1 … n."""
        return range(1, self.whole.samples + 1)

    def smoothness_at(self, batch: int) -> float:
        """Return 𝓛(τ) = L + max_i (1−p_i)L_i/(n·p_i)."""
        kept = self.whole.odds(self.weights, batch) * np.asarray(self.whole.each)
        return self.whole.smoothness + float(kept.max()) / self.whole.samples

    def noise_at(self, batch: int) -> float:
        """Return σ(τ) = (1/n²) Σ_i (1/p_i − 1)h_i."""
        kept = self.whole.odds(self.weights, batch) * np.asarray(self.whole.squares)
        return float(kept.sum()) / self.whole.samples**2


@dataclass(frozen=True, slots=True)
class _OnePart:
    """Draw one part, part j with probability q_j, and samples of it."""

    parts: Sequence[Part]
    chances: Sequence[float]
    """q_j of each part; they sum to 1."""

    def __post_init__(self) -> None:
        _check_chances(self.parts, self.chances)

    @property
    def batches(self) -> Sequence[int]:
        """Return 1 … the samples of the smallest part."""
        return range(1, min(part.samples for part in self.parts) + 1)


@dataclass(frozen=True, slots=True)
class PartitionNice(_OnePart):
    """Draw one part, part j with probability q_j, and every subset of τ of its samples alike; v_i = n_j/(q_j·τ).

    At τ = n_j noise is left unless every G_j is 0.

    Source: after Alfarra et al. 2020, arXiv 2005.01097.
    """

    def smoothness_at(self, batch: int) -> float:
        """Return 𝓛(τ) = max_j n_j/(n·q_j) · [n_j(τ−1)L_j + (n_j−τ)·max L_i] / (τ(n_j−1)). Alone: L_j/(n·q_j)."""
        rows = zip(self.parts, self.chances, strict=True)
        return max(p.samples * p.mixed(batch, p.smoothness, p.largest) / q for p, q in rows) / _samples(self.parts)

    def noise_at(self, batch: int) -> float:
        """Return σ(τ) = Σ_j n_j²/(n²q_j) · [n_j(τ−1)‖G_j‖² + (n_j−τ)h̄_j] / (τ(n_j−1)). Alone: ‖G_j‖²/(n²q_j)."""
        rows = zip(self.parts, self.chances, strict=True)
        total = math.fsum(p.samples**2 * p.mixed(batch, p.mean_sq, p.optimum_sq) / q for p, q in rows)
        return total / _samples(self.parts) ** 2


@dataclass(frozen=True, slots=True)
class PartitionIndependent(_OnePart):
    """Draw one part, part j with probability q_j, and take each of its samples i with a probability p_i of its own.

    Σp_i = τ over each part; v_i = 1/(q_j·p_i) if sample i is taken.

    Source: after Alfarra et al. 2020, arXiv 2005.01097.
    """

    weights: Sequence[Sequence[float]] | None = None
    """Of each part's samples, as those of `Independent`. None: p_i = τ/n_j."""

    def smoothness_at(self, batch: int) -> float:
        """Return 𝓛(τ) = (1/n) max_j (1/q_j)·[n_j·L_j + max_(i in j) ((1−p_i)/p_i)·L_i]."""
        found = [
            (part.samples * part.smoothness + float((odds * np.asarray(part.each)).max())) / chance
            for part, chance, odds in zip(self.parts, self.chances, self._odds(batch), strict=True)
        ]
        return max(found) / _samples(self.parts)

    def noise_at(self, batch: int) -> float:
        """Return σ(τ) = (1/n²) Σ_j (1/q_j)·[n_j²‖G_j‖² + Σ_(i in j) ((1−p_i)/p_i)·h_i]."""
        found = [
            (part.samples**2 * part.mean_sq + float((odds * np.asarray(part.squares)).sum())) / chance
            for part, chance, odds in zip(self.parts, self.chances, self._odds(batch), strict=True)
        ]
        return math.fsum(found) / _samples(self.parts) ** 2

    def _odds(self, batch: int) -> list[Array]:
        weights = self.weights or [None] * len(self.parts)
        return [part.odds(own, batch) for part, own in zip(self.parts, weights, strict=True)]


@dataclass(frozen=True, slots=True)
class Stratified:
    """Draw τ_j samples of every part at once, every subset of them alike; v_i = n_j/τ_j. τ_j is about τ·n_j/n.

    Not in the paper. At τ = n no noise is left.

    Source: derived for this project.
    """

    smoothness: float
    """L of the mean loss of all samples."""
    parts: Sequence[Part]

    @property
    def batches(self) -> Sequence[int]:
        """Return the number of parts … n."""
        return range(len(self.parts), _samples(self.parts) + 1)

    def smoothness_at(self, batch: int) -> float:
        """Return the bound L + max_j n_j(n_j−τ_j)/(n·τ_j(n_j−1)) · max L_i of 𝓛(τ)."""
        return self.smoothness + max(
            part.samples * part.left(own) * part.largest / _samples(self.parts)
            for part, own in zip(self.parts, self._shares(batch), strict=True)
        )

    def noise_at(self, batch: int) -> float:
        """Return σ(τ) = Σ_j (n_j/n)² (n_j−τ_j)/(τ_j(n_j−1)) · (h̄_j − ‖G_j‖²)."""
        found = [
            part.samples**2 * part.left(own) * max(0.0, part.optimum_sq - part.mean_sq)
            for part, own in zip(self.parts, self._shares(batch), strict=True)
        ]
        return math.fsum(found) / _samples(self.parts) ** 2

    def _shares(self, batch: int) -> list[int]:
        return shares([part.samples for part in self.parts], batch)


def sampling_cost(sampling: Sampling, batch: int, *, mu: float, epsilon: float) -> float:
    """Return τ·max{𝓛(τ), 2σ(τ)/(εμ)}: gradient evaluations to ε, up to a factor that does not depend on τ.

    Source: after Alfarra et al. 2020, arXiv 2005.01097.
    """
    check_positive(mu=mu, epsilon=epsilon)
    return batch * max(sampling.smoothness_at(batch), 2 * sampling.noise_at(batch) / (epsilon * mu))


def cheapest_batch(sampling: Sampling, *, mu: float, epsilon: float) -> int:
    """Return τ*, the least batch of least `sampling_cost`, by a search of all.

    Source: after Alfarra et al. 2020, arXiv 2005.01097.
    """
    return min(sampling.batches, key=lambda batch: sampling_cost(sampling, batch, mu=mu, epsilon=epsilon))


def sampling_lr(sampling: Sampling, batch: int, *, mu: float, epsilon: float, most_noise: float = math.inf) -> float:
    """Return γ = ½ min{1/𝓛(τ), εμ/min(C, 2σ(τ))}, the step size that reaches ε.

    Args:
        sampling: How batches are drawn.
        batch: τ.
        mu: μ.
        epsilon: ε.
        most_noise: C, which keeps γ from vanishing while σ is that of a point far from the optimum.

    Source: after Alfarra et al. 2020, arXiv 2005.01097.
    """
    check_positive(mu=mu, epsilon=epsilon, most_noise=most_noise)
    noise = min(most_noise, 2 * sampling.noise_at(batch)) / (epsilon * mu)
    return 1 / (2 * max(sampling.smoothness_at(batch), noise))


def _samples(parts: Sequence[Part]) -> int:
    return sum(part.samples for part in parts)


def _check_chances(parts: Sequence[Part], chances: Sequence[float]) -> None:
    check_positive(chances=chances)
    if len(chances) != len(parts) or abs(math.fsum(chances) - 1) > 1e-9:
        raise ValueError(f"chances={list(chances)} must sum to 1, one for each of the {len(parts)} parts")
