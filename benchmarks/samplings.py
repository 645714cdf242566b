"""Gradient evaluations by sampling and batch, beside the formulas: `python benchmarks/samplings.py`.

Ridge regression on scikit-learn's diabetes data and logistic regression on its breast cancer data, in numpy. L_i, μ, x*
and the gradients there are computed exactly. SGD takes the step size of the formulas for every sampling and batch
until the mean squared distance from the optimum is a tenth of what it was.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paired import Report, arguments, keep, show
from sklearn.datasets import load_breast_cancer, load_diabetes

from distgrow.core.sampling import NiceSampling, PartitionSampling, SamplingSpec, StratifiedSampling
from distgrow.theory.finite_sum import FiniteSum
from distgrow.theory.parts import Part
from distgrow.theory.samplings import Nice, PartitionNice, Sampling, Stratified, cheapest_batch, sampling_lr

Array = NDArray[np.float64]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 400)
PARTS, SEEDS, NEAR, MOST = 4, 8, 0.1, 40_000


@dataclass(frozen=True)
class Problem:
    """A regularised generalised linear model; rows are sorted by their target, so that parts differ."""

    name: str
    x: Array
    y: Array
    slopes: Callable[[Array], Array]  #: products x·θ → derivatives of the losses by them, but for −y
    curvature: float  #: largest second derivative of a loss by its product
    penalty: float
    optimum: Array

    def gradients(self, theta: Array, rows: NDArray[np.int64]) -> Array:
        """∇f_i(θ) of each run's rows, (runs, rows, dimensions), for (runs, dimensions) parameters."""
        x = self.x[rows]
        slopes = self.slopes(np.einsum("rbd,rd->rb", x, theta)) - self.y[rows]
        return slopes[..., None] * x + self.penalty * theta[:, None, :]

    @property
    def epsilon(self) -> float:
        """ε: a share of the squared distance from 0 to the optimum."""
        return NEAR * float(self.optimum @ self.optimum)

    def part(self, rows: Sequence[int]) -> Part:
        """The constants of a part."""
        x, at = self.x[list(rows)], np.array([list(rows)])
        gradients = self.gradients(self.optimum[None], at)[0]
        largest = self.curvature * np.linalg.eigvalsh(x.T @ x / len(x))[-1] + self.penalty
        mean = gradients.mean(0)
        each = self.curvature * (x**2).sum(1) + self.penalty
        return Part(
            smoothness=float(largest), each=each.tolist(), squares=(gradients**2).sum(1).tolist(),
            mean_sq=float(mean @ mean),
        )  # fmt: skip


def sigmoid(products: Array) -> Array:
    """1/(1 + exp(−z))."""
    return 1 / (1 + np.exp(-products))


def standard(x: Any, y: Any) -> tuple[Array, Array]:
    """Features of mean 0 and variance 1, sorted by the target."""
    order = np.argsort(y, kind="stable")
    return ((x - x.mean(0)) / x.std(0))[order], y[order]


def ridge() -> Problem:
    """½(x·θ − y)² + ½λ|θ|², y of mean 0 and variance 1."""
    found: Any = load_diabetes(return_X_y=True)
    x, y = standard(*found)
    y = (y - y.mean()) / y.std()
    penalty = 1.0
    optimum = np.linalg.solve(x.T @ x / len(x) + penalty * np.eye(x.shape[1]), x.T @ y / len(x))
    return Problem("ridge regression, diabetes", x, y, lambda products: products, 1.0, penalty, optimum)


def logistic() -> Problem:
    """log(1 + exp(x·θ)) − y x·θ + ½λ|θ|²; the optimum is Newton's."""
    found: Any = load_breast_cancer(return_X_y=True)
    x, y = standard(*found)
    penalty, theta = 0.5, np.zeros(x.shape[1])
    for _ in range(50):
        chance = sigmoid(x @ theta)
        hessian = (x * (chance * (1 - chance))[:, None]).T @ x / len(x) + penalty * np.eye(len(theta))
        theta -= np.linalg.solve(hessian, x.T @ (chance - y) / len(x) + penalty * theta)
    return Problem("logistic regression, breast cancer", x, y, sigmoid, 0.25, penalty, theta)


def samplings(problem: Problem) -> dict[str, tuple[SamplingSpec, Sampling]]:
    """Each sampling as it is drawn, and as a formula."""
    n, whole = len(problem.x), problem.part(range(len(problem.x)))
    spec = StratifiedSampling(parts=PARTS)
    ends = np.cumsum([0, *spec.sizes(n)])
    parts = [problem.part(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    constants = FiniteSum(
        samples=n, smoothness=whole.smoothness, largest_smoothness=whole.largest, mu=problem.penalty,
        optimum_sq=whole.optimum_sq,
    )  # fmt: skip
    return {
        "nice": (NiceSampling(), Nice(constants)),
        "stratified": (spec, Stratified(whole.smoothness, parts)),
        "partition": (PartitionSampling(parts=PARTS), PartitionNice(parts, [part.samples / n for part in parts])),
    }


def updates(problem: Problem, spec: SamplingSpec, batch: int, lr: float, seeds: int, most: int) -> int | None:
    """Updates until the mean over seeds of |θ − θ*|² is at most ε; None if that takes more than `most`."""
    n, offsets = len(problem.x), np.arange(batch)
    theta = np.zeros((seeds, problem.x.shape[1]))
    for step in range(1, most + 1):
        rows = np.stack([spec.rows(n, seed, step * batch, batch, offsets) for seed in range(seeds)])
        theta -= lr * problem.gradients(theta, rows).mean(1)
        if ((theta - problem.optimum) ** 2).sum(1).mean() <= problem.epsilon:
            return step
    return None


def bound(problem: Problem, sampling: Sampling, batch: int) -> int:
    """Gradient evaluations that the formulas promise to suffice."""
    lr = sampling_lr(sampling, batch, mu=problem.penalty, epsilon=problem.epsilon)
    return batch * math.ceil(math.log(2 / NEAR) / (lr * problem.penalty))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Gradient evaluations of one sampling at one batch."""

    problem: str
    sampling: str
    batch: int
    bound: int
    measured: int | None  #: None: more than `MOST` updates


def measure(problem: Problem, batches: Sequence[int], seeds: int, most: int) -> Iterator[Cost]:
    """Measure every sampling at every batch that it can draw."""
    for name, (spec, sampling) in samplings(problem).items():
        for batch in batches:
            if batch in sampling.batches and batch <= spec.largest(len(problem.x)):
                lr = sampling_lr(sampling, batch, mu=problem.penalty, epsilon=problem.epsilon)
                took = updates(problem, spec, batch, lr, seeds, most)
                measured = None if took is None else took * batch
                promised = bound(problem, sampling, batch)
                yield Cost(problem=problem.name, sampling=name, batch=batch, bound=promised, measured=measured)


def report(problem: Problem, costs: Sequence[Cost], batches: Sequence[int]) -> Report:
    """Return the table of a problem: a row for each batch."""
    found = samplings(problem)
    rows: list[list[str]] = []
    for batch in batches:
        here = {cost.sampling: cost for cost in costs if cost.batch == batch}
        shown = {name: (f"{cost.bound:,}", f"{cost.measured or math.inf:,}") for name, cost in here.items()}
        rows.append([f"{batch}", *(text for name in found for text in shown.get(name, ("", "")))])
    best = [cheapest_batch(own, mu=problem.penalty, epsilon=problem.epsilon) for _, own in found.values()]
    rows.append(["τ*", *(text for batch in best for text in (f"b = {batch}", ""))])
    n, dimensions = problem.x.shape
    return Report(
        title=f"{problem.name}: n = {n}, {dimensions} features",
        columns=["b", *(f"{name}: {what}" for name in found for what in ("bound", "measured"))],
        rows=rows,
    )


def main() -> None:
    """Measure, and show the tables."""
    options = arguments(__doc__).parse_args()
    batches, seeds, most = ((16, 64), 2, 50) if options.quick else (BATCHES, SEEDS, MOST)
    problems = ridge(), logistic()
    costs = [list(measure(problem, batches, seeds, most)) for problem in problems]
    if options.jsonl:
        keep(options.jsonl, [cost for each in costs for cost in each])
    reports = [report(problem, own, batches) for problem, own in zip(problems, costs, strict=True)]
    show(reports, markdown=options.markdown)


if __name__ == "__main__":
    main()
