"""Probes: exact full gradients, curvature and noise of a whole data set on all ranks; leaves the parameters alone.

A gradient of n samples costs n gradient evaluations, a Hessian-vector product of n samples 2n. All are counted.
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
from distgrow.engine.items import Items, count_items
from distgrow.engine.protocol import Engine

Batches = Iterable[tuple[Any, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Hold a number with its standard error. An exact number has error 0."""

    value: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Hold two traces: of Σ, the covariance of one sample's gradient, and of its product with the Hessian H."""

    trace: Estimate  #: tr Σ, gradient²
    curved: Estimate  #: tr(HΣ), gradient² · loss / parameter²


class Probe:
    """Measure one engine's objective at its present parameters. Collective: every rank must call each method."""

    def __init__(
        self, engine: Engine, world: World, batches: Callable[[], Batches], items: Items | None = None
    ) -> None:
        """Take the objective at the present parameters. No gradient is evaluated yet.

        Args:
            engine: Gives the objective, and counts the gradient evaluations.
            world: The ranks.
            batches: Called once for each pass. Returns an iterable of this rank's batches of the data set, each with
                the number of its rows that count.
            items: Counts what a batch's loss is a mean over, if that is not rows.
        """
        self._engine, self._world, self._batches, self._items = engine, world, batches, items
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
        """Average `measure` over all samples of the data set, or over their items.

        Args:
            measure: Returns means over the rows or items of a batch.
            like: Tensors with the shapes, types and devices of the result.
            cost: Gradient evaluations per sample.
        """
        sums = [torch.zeros_like(tensor) for tensor in like]
        seen = 0.0
        with kept_random_state(self._world.device):
            for batch, rows in self._batches():
                if not rows:
                    continue
                self._engine.evaluations += cost * rows
                if not (count := rows if self._items is None else count_items(self._items, batch)):
                    continue
                seen += count
                for total, part in zip(sums, measure(batch), strict=True):
                    total.add_(part, alpha=count)
        self.passes += cost
        self._world.add(sums)
        (count,) = self._world.sum([seen])
        return [total.div_(count) for total in sums]

    def product(self, vector: Vector) -> Vector:
        """Return H·`vector`. H is the Hessian of f, the mean loss with the optimizer's L2 penalty."""
        return self._mean(lambda batch: self._objective.product(batch, vector), like=self._objective.parameters, cost=2)

    def smoothness(self, *, tolerance: float, most: int, seed: int) -> tuple[float, int]:
        """Return L, the largest |eigenvalue| of the Hessian, and the number of Hessian-vector products that it took.

        Power iteration from a random direction. |Hv| of its unit vectors never falls and never exceeds L. The
        iteration ends when a product raises |Hv| by less than `tolerance` of itself, or after `most` products.
        """
        numbers, value = torch.Generator().manual_seed(seed), 0.0
        vector = [
            torch.randn(p.shape, generator=numbers, dtype=p.dtype).to(p.device) for p in self._objective.parameters
        ]
        norm = self.norm(vector)
        for count in range(1, most + 1):
            vector = self.product([part / norm for part in vector])
            norm = self.norm(vector)
            if norm - value <= tolerance * norm:  # true as well if norm is 0
                return max(norm, value), count
            value = norm
        return value, most

    def curvature(self, gradient: Vector) -> float:
        """Return GᵀHG/|G|² for G = `gradient`. Return NaN if G is 0."""
        norm = self.norm(gradient)
        if norm == 0:
            return math.nan
        unit = [part / norm for part in gradient]
        return self._agreed(dot(unit, self.product(unit)))

    def noise(self, gradient: Vector, samples: int, pairs: Iterable[tuple[tuple[Any, int], tuple[Any, int]]]) -> Noise:
        """Estimate tr Σ and tr(HΣ), Σ the covariance of one sample's gradient.

        First batches and second batches are each a random partition of the data set, drawn independently. Let ξ be the
        mean gradient of the first batch less ∇f, n_A its rows, n all samples and H_C the Hessian of the second batch.
        Then E|ξ|² = (tr Σ/n_A)(n − n_A)/(n − 1), and E[ξᵀH_Cξ] is the same of tr(HΣ): both are unbiased [D].

        Args:
            gradient: ∇f.
            samples: n.
            pairs: This rank's pairs of (batch, rows).

        Returns:
            Both traces. Standard errors are those of independent pairs. tr Σ is exact if every first batch is a single
            sample.
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
