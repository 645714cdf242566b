"""Density of a model that is pruned while it trains, its average size, and the law of its loss; knows no engine.

Symbols: s (`sparsity`), the final share of zeros, 0 ≤ s < 1; c, the share of the run's compute that is spent; x, the
share of its samples; N, parameters that can be pruned; N̄, their average number along the samples; D, samples or tokens.
Compute is counted in samples of the dense model: a sample at density d costs d. Pruning goes from the share `start` of
the compute to the share `end`. Its density is linear in compute and geometric in samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from distgrow.theory.numbers import Array, check_positive


def mean_density(sparsity: float) -> float:
    """Return m(s) = s/(−ln(1 − s)), the mean density along the samples while it falls from 1 to 1 − s.

    Source: derived for this project, after Jin et al. 2025, arXiv 2501.12486.
    """
    _check(sparsity)
    return sparsity / -math.log1p(-sparsity) if sparsity else 1.0


def density_at_compute(share: float, sparsity: float, start: float = 0.25, end: float = 0.75) -> float:
    """Return 1 − s·(c − start)/(end − start), between 1 and 1 − s: the density when the share c of compute is spent.

    Source: derived for this project, after the code of Jin et al. 2025, arXiv 2501.12486.
    """
    _check(sparsity, start, end)
    return 1 - sparsity * min(1.0, max(0.0, (share - start) / (end - start)))


def samples_per_compute(sparsity: float, start: float = 0.25, end: float = 0.75) -> float:
    """Return T/C = start + (end − start)/m(s) + (1 − end)/(1 − s): samples of a run over those that it costs.

    A dense run of C samples costs as much as a pruned one of T.

    Source: derived for this project, after the code of Jin et al. 2025, arXiv 2501.12486.
    """
    _check(sparsity, start, end)
    return start + (end - start) / mean_density(sparsity) + (1 - end) / (1 - sparsity)


def average_density(sparsity: float, start: float = 0.25, end: float = 0.75) -> float:
    """Return N̄/N = C/T, the mean density along the samples of the whole run.

    Source: derived for this project, after the code of Jin et al. 2025, arXiv 2501.12486.
    """
    return 1 / samples_per_compute(sparsity, start, end)


def pruned_samples(sparsity: float, start: float = 0.25, end: float = 0.75) -> tuple[float, float]:
    """Return the shares x of the run's samples at which pruning begins and ends.

    Source: derived for this project, after the code of Jin et al. 2025, arXiv 2501.12486.
    """
    whole = samples_per_compute(sparsity, start, end)
    return start / whole, (start + (end - start) / mean_density(sparsity)) / whole


def density_at_samples(share: float, sparsity: float, start: float = 0.25, end: float = 0.75) -> float:
    """Return the density at the share x of the samples: 1, (1 − s)^((x − x₁)/(x₂ − x₁)), and 1 − s from x₂ on.

    Source: derived for this project: density is linear in compute, so along the samples its derivative is
    proportional to itself.
    """
    first, last = pruned_samples(sparsity, start, end)
    return (1 - sparsity) ** min(1.0, max(0.0, (share - first) / (last - first)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Hold L = A/N̄^α + B/D^β + E, the loss of a model of average size N̄ after D tokens.

    Source: Jin et al. 2025, arXiv 2501.12486, after Hoffmann et al. 2022, arXiv 2203.15556.
    """

    size_factor: float  #: A, loss · parameters^α
    data_factor: float  #: B, loss · tokens^β
    floor: float  #: E, loss
    size_power: float = 0.34  #: α
    data_power: float = 0.28  #: β

    def loss(self, size: float, data: float) -> float:
        """Return L for `size` parameters on average and `data` tokens.

        Source: Jin et al. 2025, arXiv 2501.12486.
        """
        check_positive(size=size, data=data)
        return self.size_factor / size**self.size_power + self.data_factor / data**self.data_power + self.floor


def fit_law(
    sizes: Sequence[float],
    data: Sequence[float],
    losses: Sequence[float],
    size_power: float = 0.34,
    data_power: float = 0.28,
) -> tuple[Law, float]:
    """Return the law by least squares at given powers α and β, and the root of its mean squared residual.

    A, B and E are not negative: a larger model or more data do not make the loss worse. One is 0 if the losses do not
    need it. At equal compute N̄·D is the same at every density: only runs of several computes tell A from B.

    Source: the form after Jin et al. 2025, arXiv 2501.12486; non-negative least squares for this project.

    Raises:
        ValueError: There are fewer than 4 losses, or as many sizes or data as losses are not given.
    """
    if not len(sizes) == len(data) == len(losses) >= 4:
        raise ValueError(
            f"{len(sizes)} sizes, {len(data)} data, {len(losses)} losses: give as many of each, at least 4"
        )
    check_positive(sizes=sizes, data=data, size_power=size_power, data_power=data_power)
    found: Array = np.asarray(losses, float)
    terms: Array = np.stack(
        [np.asarray(sizes, float) ** -size_power, np.asarray(data, float) ** -data_power, np.ones(len(losses))]
    )
    factors = _not_negative(terms, found)
    law = Law(
        size_factor=float(factors[0]), data_factor=float(factors[1]), floor=float(factors[2]),
        size_power=size_power, data_power=data_power,
    )  # fmt: skip
    return law, float(np.sqrt(np.mean((factors @ terms - found) ** 2)))


def _not_negative(terms: Array, found: Array) -> Array:
    """Return factors ≥ 0 of the rows of `terms` whose sum is nearest to `found`: the best of all supports."""
    best, least = np.zeros(len(terms)), float(found @ found)
    for support in (s for size in range(1, len(terms) + 1) for s in combinations(range(len(terms)), size)):
        chosen = terms[list(support)]
        scale = np.abs(chosen).max(axis=1)
        factors = np.linalg.lstsq((chosen.T / scale), found, rcond=None)[0] / scale
        apart = float(np.sum((factors @ chosen - found) ** 2))
        if factors.min() >= 0 and apart < least:
            best, least = np.zeros(len(terms)), apart
            best[list(support)] = factors
    return best


def _check(sparsity: float, start: float = 0.25, end: float = 0.75) -> None:
    """Check the shares. ValueError if one cannot be."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and below 1")
    if not 0 <= start < end <= 1:
        raise ValueError(f"start={start} must be at least 0 and below end={end}, which is at most 1")
