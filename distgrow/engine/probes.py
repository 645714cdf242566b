"""Probes: exact full gradients, curvature and noise of a whole data set on all ranks; moves nothing, counts all.

A gradient of n samples costs n gradient evaluations, a Hessian-vector product of n samples 2n.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from distgrow.data.seeding import kept_generators, seed_generators
from distgrow.distributed.world import World
from distgrow.engine.functional import Vector
from distgrow.engine.spec import Engine

Batches = Iterable[tuple[Any, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its standard error, which is 0 where it is exact."""

    value: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What Σ, the covariance of one sample's gradient, and the Hessian H have in common."""

    trace: Estimate  #: tr Σ, gradient²
    curved: Estimate  #: tr(HΣ), gradient² · loss / parameter²


class Probe:
    """What one engine's objective is like at its present parameters; every method is collective."""

    def __init__(self, engine: Engine, world: World, batches: Callable[[], Batches]) -> None:
        """`batches` gives this rank's (batch, rows of it that count) of the data set, anew at each call."""
        self._engine, self._world, self._batches = engine, world, batches
        self._objective = engine.functional()
        self.passes = 0  #: gradient evaluations made of each sample

    def gradient(self) -> tuple[float, Vector]:
        """Return the mean loss over the data set, and ∇f with the optimizer's L2 penalty."""

        def differentiated(batch: Any) -> Vector:
            loss, gradient = self._objective.gradient(batch)
            return [loss.double(), *gradient]

        zero = torch.zeros((), dtype=torch.float64, device=self._world.device)
        loss, *gradient = self._mean(differentiated, like=[zero, *self._objective.parameters], cost=1)
        return float(loss), gradient

    def _mean(self, measure: Callable[[Any], Vector], *, like: Vector, cost: int) -> Vector:
        """Average `measure`, a mean over a batch, over all samples, at `cost` evaluations a sample."""
        sums = [torch.zeros_like(tensor) for tensor in like]
        seen = 0
        with kept_random_state(self._world.device):
            for batch, rows in self._batches():
                if not rows:
                    continue
                seen += rows
                self._engine.evaluations += cost * rows
                for total, part in zip(sums, measure(batch), strict=True):
                    total.add_(part, alpha=rows)
        self.passes += cost
        self._world.add(sums)
        (rows,) = self._world.sum([seen])
        return [total.div_(rows) for total in sums]

    def product(self, vector: Vector) -> Vector:
        """H·`vector`, H the Hessian of f: of the mean loss and the optimizer's L2 penalty."""
        return self._mean(lambda batch: self._objective.product(batch, vector), like=self._objective.parameters, cost=2)

    def smoothness(self, *, tolerance: float, most: int, seed: int) -> tuple[float, int]:
        """L, the largest |eigenvalue| of the Hessian, and the Hessian-vector products that it took, at most `most`.

        Power iteration from a random direction. |Hv| of the unit vectors on its way never falls and never exceeds L;
        it ends when a product has raised it by less than `tolerance` of itself.
        """
        numbers, value = torch.Generator().manual_seed(seed), 0.0
        vector = [
            torch.randn(p.shape, generator=numbers, dtype=p.dtype).to(p.device) for p in self._objective.parameters
        ]
        norm = self.norm(vector)
        for count in range(1, most + 1):
            vector = self.product([part / norm for part in vector])
            norm = self.norm(vector)
            if norm - value <= tolerance * norm:  # also where it is 0
                return max(norm, value), count
            value = norm
        return value, most

    def curvature(self, gradient: Vector) -> float:
        """GᵀHG/|G|² of G = `gradient`; NaN where that is 0."""
        norm = self.norm(gradient)
        if norm == 0:
            return math.nan
        unit = [part / norm for part in gradient]
        return self._agreed(dot(unit, self.product(unit)))

    def noise(self, gradient: Vector, samples: int, pairs: Iterable[tuple[tuple[Any, int], tuple[Any, int]]]) -> Noise:
        """tr Σ and tr(HΣ), Σ the covariance of one sample's gradient, from this rank's `pairs` of (batch, rows).

        First batches and second batches are each a random partition of the data set, drawn independently. With ξ the
        first's mean gradient less ∇f, n_A its rows, n all samples and H_C the second's Hessian,
        E|ξ|² = (tr Σ/n_A)(n − n_A)/(n − 1), and E[ξᵀH_Cξ] the same of tr(HΣ): both are unbiased [D].
        tr Σ is exact where the first batches are single samples. Standard errors are those of independent pairs.
        """
        found: list[tuple[float, float]] = []
        exact = True
        with kept_random_state(self._world.device):
            for (batch, rows), (other, others) in pairs:
                self._engine.evaluations += rows + 2 * others
                _, part = self._objective.gradient(batch)
                apart = [a - b for a, b in zip(part, gradient, strict=True)]
                weight = rows * (samples - 1) / (samples - rows)
                bent = self._objective.product(other, apart)
                found.append((weight * dot(apart, apart), weight * dot(apart, bent)))
                exact = exact and rows == 1
        self.passes += 3
        traces, curved = zip(*found, strict=True) if found else ((), ())
        trace, noise_curvature = self._estimate(traces), self._estimate(curved)
        coarse = self._world.sum([not exact])[0]
        return Noise(trace=trace if coarse else Estimate(value=trace.value, error=0.0), curved=noise_curvature)

    def _estimate(self, values: Iterable[float]) -> Estimate:
        """Return the mean of all ranks' values, with its error if they are independent."""
        values = list(values)
        count, total, squares = self._world.sum([len(values), sum(values), sum(value * value for value in values)])
        mean = total / count
        spread = max(0.0, squares / count - mean * mean)
        return Estimate(value=mean, error=math.sqrt(spread / (count - 1)) if count > 1 else math.inf)

    def norm(self, vector: Vector) -> float:
        """Return the Euclidean norm, the same number on every rank."""
        return math.sqrt(self._agreed(dot(vector, vector)))

    def _agreed(self, value: float) -> float:
        """Return one number for all ranks, of values that differ by rounding alone."""
        return self._world.sum([value])[0] / self._world.size


def dot(one: Vector, other: Vector) -> float:
    """Return the inner product, summed in double precision."""
    parts = [(a * b).sum(dtype=torch.float64) for a, b in zip(one, other, strict=True)]
    return float(torch.stack(parts).sum())


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Seed the generators for a probe, and restore their states at its end.

    A loss that draws random numbers then has the same gradient in a run that was resumed.
    """
    with kept_generators(device):
        seed_generators(0, device)
        yield
