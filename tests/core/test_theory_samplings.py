"""Samplings against every batch that they can draw, the fixture's table, and a search of every batch."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.growth.tau_nice import TauNice
from distgrow.theory.finite_sum import FiniteSum
from distgrow.theory.numbers import Array
from distgrow.theory.parts import Part, inclusion, shares
from distgrow.theory.samplings import (
    Independent,
    Nice,
    PartitionIndependent,
    PartitionNice,
    Sampling,
    Stratified,
    cheapest_batch,
    sampling_cost,
    sampling_lr,
)

Drawn = Iterator[tuple[float, Array]]  #: (probability, v) of every batch that can be drawn


class Problem:
    """f_i = ½ x'A_i x − c_i'x of known minimum, its samples cut into parts."""

    def __init__(self, matrices: Array, linear: Array, sizes: Sequence[int]) -> None:
        self.matrices, self.linear, self.n = matrices, linear, len(matrices)
        self.optimum = np.linalg.solve(matrices.mean(0), linear.mean(0))
        ends = np.cumsum(sizes)
        self.cells = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
        self.whole, self.parts = self._part(range(self.n)), [self._part(cell) for cell in self.cells]
        self.mu = float(np.linalg.eigvalsh(matrices.mean(0))[0])

    def _part(self, cell: Sequence[int]) -> Part:
        rows = list(cell)
        gradients = self.gradients(self.optimum)[rows]
        largest = [float(np.linalg.eigvalsh(self.matrices[i])[-1]) for i in rows]
        mean = gradients.mean(0)
        return Part(
            smoothness=float(np.linalg.eigvalsh(self.matrices[rows].mean(0))[-1]),
            each=largest,
            squares=[float(g @ g) for g in gradients],
            mean_sq=float(mean @ mean),
        )

    def gradients(self, x: Array) -> Array:
        """∇f_i(x), a row for each sample."""
        return self.matrices @ x - self.linear

    def gap(self, x: Array) -> float:
        """f(x) − f*."""
        away = x - self.optimum
        return float(0.5 * away @ self.matrices.mean(0) @ away)

    def constants(self) -> FiniteSum:
        """The constants that τ-nice needs."""
        own = self.whole
        return FiniteSum(
            samples=own.samples, smoothness=own.smoothness, largest_smoothness=own.largest, mu=self.mu,
            optimum_sq=own.optimum_sq,
        )  # fmt: skip


def fixture(sizes: Sequence[int] = (2, 2)) -> Problem:
    """The four points of seeds.md: f_i = ½a_i(x − c_i)², a = 1, 2, 3, 4, c = 0, 1, −1, 2."""
    a, c = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, -1.0, 2.0])
    return Problem(a[:, None, None], (a * c)[:, None], sizes)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any least squares problem of 2 … 7 samples in two dimensions, cut into parts."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) > 1))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    factors = random.normal(size=(sum(sizes), 2, 2)) * random.lognormal(size=(sum(sizes), 1, 1))
    matrices = factors @ factors.transpose(0, 2, 1) + 0.05 * np.eye(2)
    return Problem(matrices, random.normal(size=(sum(sizes), 2)) * 3, sizes)


def nice(cell: Sequence[int], batch: int, n: int) -> Drawn:
    """Every subset of a cell, weighted for that cell's mean."""
    subsets = list(combinations(cell, batch))
    for rows in subsets:
        v = np.zeros(n)
        v[list(rows)] = len(cell) / batch
        yield 1 / len(subsets), v


def independent(cell: Sequence[int], chances: Array, n: int) -> Drawn:
    """Every outcome of a coin for each sample of a cell."""
    for taken in product((False, True), repeat=len(cell)):
        v = np.zeros(n)
        v[list(cell)] = np.where(taken, 1 / chances, 0.0)
        yield float(np.prod(np.where(taken, chances, 1 - chances))), v


def one_part(problem: Problem, chances: Sequence[float], draws: Sequence[Drawn]) -> Drawn:
    """One of the parts, then a draw of its own."""
    for chance, draw in zip(chances, draws, strict=True):
        yield from ((chance * own, v / chance) for own, v in draw)


def every_part(draws: Sequence[Drawn]) -> Drawn:
    """A draw of every part at once."""
    for outcome in product(*map(list, draws)):
        yield math.prod(chance for chance, _ in outcome), np.sum([v for _, v in outcome], axis=0)


def samplings(problem: Problem, weights: Sequence[float]) -> Iterator[tuple[Sampling, int, list[tuple[float, Array]]]]:
    """Every sampling at every batch, with all that it can draw."""
    n, cells, chances = problem.n, problem.cells, np.array([weights[cell[0]] for cell in problem.cells])
    chances, own = (chances / chances.sum()).tolist(), [[weights[i] for i in cell] for cell in cells]
    for sampling in (Nice(problem.constants()), Independent(problem.whole), Independent(problem.whole, weights)):
        for batch in sampling.batches:
            cell, even = range(n), isinstance(sampling, Independent) and sampling.weights is None
            p = np.full(n, batch / n) if even else inclusion(weights, batch)
            is_nice = isinstance(sampling, Nice)
            yield sampling, batch, list(nice(cell, batch, n) if is_nice else independent(cell, p, n))
    for batch in range(1, min(map(len, cells)) + 1):
        subsets = [nice(cell, batch, n) for cell in cells]
        yield PartitionNice(problem.parts, chances), batch, list(one_part(problem, chances, subsets))
        coins = [independent(c, inclusion(w, batch), n) for c, w in zip(cells, own, strict=True)]
        yield PartitionIndependent(problem.parts, chances, own), batch, list(one_part(problem, chances, coins))
    stratified = Stratified(problem.whole.smoothness, problem.parts)
    for batch in stratified.batches:
        counts = shares([len(cell) for cell in cells], batch)
        yield stratified, batch, list(every_part([nice(c, k, n) for c, k in zip(cells, counts, strict=True)]))


def mean_square(problem: Problem, drawn: list[tuple[float, Array]], gradients: Array) -> float:
    """E‖(1/n)Σ v_i g_i‖²."""
    return math.fsum(chance * float(np.sum((v @ gradients / problem.n) ** 2)) for chance, v in drawn)


@settings(deadline=None, max_examples=40)
@given(problems(), st.lists(st.floats(0.1, 1), min_size=9, max_size=9), st.integers(0, 2**32))
def test_noise_is_that_of_every_batch_and_smoothness_a_bound(problem: Problem, weights: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    points = problem.optimum + random.normal(size=(5, 2)) * 2
    at_optimum = problem.gradients(problem.optimum)
    for sampling, batch, drawn in samplings(problem, weights[: problem.n]):
        assert math.fsum(chance for chance, _ in drawn) == pytest.approx(1)
        assert sum(chance * v for chance, v in drawn) == pytest.approx(np.ones(problem.n))
        noise = mean_square(problem, drawn, at_optimum)
        assert sampling.noise_at(batch) == pytest.approx(noise, rel=1e-9, abs=1e-9), sampling
        for x in points:
            square = mean_square(problem, drawn, problem.gradients(x) - at_optimum)
            assert square <= 2 * sampling.smoothness_at(batch) * problem.gap(x) * (1 + 1e-9) + 1e-12, sampling


@settings(deadline=None, max_examples=40)
@given(problems(), st.floats(1e-4, 10), st.lists(st.floats(0.1, 1), min_size=9, max_size=9))
def test_no_batch_costs_less_than_the_cheapest(problem: Problem, epsilon: float, weights: list[float]) -> None:
    for sampling in {id(s): s for s, _, _ in samplings(problem, weights[: problem.n])}.values():
        best = cheapest_batch(sampling, mu=problem.mu, epsilon=epsilon)
        every = [
            batch * max(sampling.smoothness_at(batch), 2 * sampling.noise_at(batch) / (epsilon * problem.mu))
            for batch in sampling.batches
        ]
        assert sampling_cost(sampling, best, mu=problem.mu, epsilon=epsilon) == min(every)


TABLE = [
    (Nice(fixture().constants()), {1: (13.475, 4), 2: (4.49167, 3), 3: (1.49722, 2.66667), 4: (0, 2.5)}),
    (Independent(fixture().whole), {1: (10.10625, 5.5), 2: (3.36875, 3.5), 3: (1.122917, 2.83333), 4: (0, 2.5)}),
    (Stratified(2.5, fixture().parts), {2: (6.73625, 4.5), 4: (0, 2.5)}),
    (PartitionNice(fixture().parts, (0.5, 0.5)), {1: (13.475, 4), 2: (0.0025, 3.5)}),
    (PartitionIndependent(fixture().parts, (0.5, 0.5)), {1: (6.74, 5.5), 2: (0.0025, 3.5)}),
]


@pytest.mark.parametrize(("sampling", "rows"), TABLE, ids=lambda value: type(value).__name__)
def test_the_four_points_have_the_table_of_the_specification(
    sampling: Sampling, rows: dict[int, tuple[float, float]]
) -> None:
    for batch, (noise, smoothness) in rows.items():
        assert sampling.noise_at(batch) == pytest.approx(noise, abs=6e-6)
        assert sampling.smoothness_at(batch) == pytest.approx(smoothness, abs=6e-6)


@settings(deadline=None, max_examples=30)
@given(problems())
def test_one_part_that_is_always_drawn_is_tau_nice_or_independent(problem: Problem) -> None:
    pairs: list[tuple[Sampling, Sampling]] = [
        (PartitionNice([problem.whole], [1.0]), Nice(problem.constants())),
        (PartitionIndependent([problem.whole], [1.0]), Independent(problem.whole)),
    ]
    for part, whole in pairs:
        for batch in whole.batches:
            assert part.noise_at(batch) == pytest.approx(whole.noise_at(batch), rel=1e-9, abs=1e-12)
            assert part.smoothness_at(batch) == pytest.approx(whole.smoothness_at(batch), rel=1e-9)


def test_a_part_of_one_sample_has_no_zero_over_zero() -> None:
    problem = fixture((1, 3))
    sampling = PartitionNice(problem.parts, (0.25, 0.75))
    alone = problem.parts[0]
    assert sampling.batches == range(1, 2)
    chosen = 0.7**2 / (16 * 0.25) + 9 / (16 * 0.75) * problem.parts[1].optimum_sq
    assert sampling.noise_at(1) == pytest.approx(chosen, rel=1e-12)
    assert sampling.smoothness_at(1) >= alone.smoothness / (4 * 0.25)


@settings(deadline=None, max_examples=30)
@given(problems())
def test_the_whole_set_leaves_no_noise_but_parts_that_differ_do(problem: Problem) -> None:
    n, parts = problem.n, problem.parts
    for sampling in (
        Nice(problem.constants()), Independent(problem.whole), Stratified(problem.whole.smoothness, parts)
    ):  # fmt: skip
        assert sampling.noise_at(n) == pytest.approx(0, abs=1e-9)
        assert sampling.smoothness_at(n) == pytest.approx(problem.whole.smoothness, rel=1e-9)
    if len({part.samples for part in parts}) == 1:
        left = np.mean([part.mean_sq for part in parts])
        sampling = PartitionNice(parts, [1 / len(parts)] * len(parts))
        assert sampling.noise_at(parts[0].samples) == pytest.approx(left, rel=1e-9, abs=1e-9)


def test_parts_of_equal_gradients_leave_no_noise() -> None:
    twice = Problem(np.tile(fixture().matrices, (2, 1, 1)), np.tile(fixture().linear, (2, 1)), (4, 4))
    assert PartitionNice(twice.parts, (0.5, 0.5)).noise_at(4) == pytest.approx(0, abs=1e-12)


def test_noise_times_batch_may_rise_in_parts_that_differ_and_one_sample_is_then_best() -> None:
    part = Part(smoothness=1, each=[1.0] * 4, squares=[1.0] * 4, mean_sq=1.0)  # n_j‖G_j‖² = 4 > h̄_j
    sampling = PartitionNice([part, part], (0.5, 0.5))
    assert [batch * sampling.noise_at(batch) for batch in (1, 2, 3, 4)] == pytest.approx([1, 2, 3, 4])
    assert cheapest_batch(sampling, mu=1, epsilon=1e-6) == 1


@settings(deadline=None)
@given(
    st.integers(2, 60), st.floats(0.01, 100), st.floats(0, 0.99), st.floats(0.01, 1), st.floats(0, 100),
    st.floats(0.001, 10),
)  # fmt: skip
def test_the_search_finds_what_the_closed_form_of_tau_nice_finds(
    samples: int, smoothness: float, share: float, mu_share: float, optimum_sq: float, epsilon: float
) -> None:
    constants = {
        "samples": samples, "smoothness": smoothness, "largest_smoothness": smoothness * (1 + share * (samples - 1)),
        "mu": mu_share * smoothness, "optimum_sq": optimum_sq,
    }  # fmt: skip
    problem = FiniteSum(**constants)  # pyright: ignore[reportArgumentType]
    best = cheapest_batch(Nice(problem), mu=problem.mu, epsilon=epsilon)
    least = problem.complexity(float(best), epsilon)
    assert problem.complexity(float(problem.best_whole_batch(epsilon)), epsilon) == pytest.approx(least, rel=1e-9)
    if optimum_sq > 0:
        growth = TauNice(**constants, epsilon=epsilon)  # pyright: ignore[reportArgumentType]
        assert problem.complexity(float(growth.start), epsilon) == pytest.approx(least, rel=1e-9)
    assert sampling_lr(Nice(problem), best, mu=problem.mu, epsilon=epsilon) == pytest.approx(problem.lr(best, epsilon))


@pytest.mark.parametrize("epsilon", [1.0, 0.01])
def test_the_step_size_brings_every_sampling_of_the_four_points_to_its_target(epsilon: float) -> None:
    problem = fixture()
    for sampling, batch, drawn in samplings(problem, [0.25] * 4):
        lr = sampling_lr(sampling, batch, mu=problem.mu, epsilon=epsilon)
        contraction = [(c, 1 - lr * float(v @ problem.matrices[:, 0, 0]) / 4) for c, v in drawn]
        shift = [lr * float(v @ problem.gradients(problem.optimum)[:, 0]) / 4 for _, v in drawn]
        first, square = 10.0, 100.0  # the exact recursion of E(x − x*) and E(x − x*)²
        cost = sampling_cost(sampling, batch, mu=problem.mu, epsilon=epsilon) / batch
        for _ in range(math.ceil(2 / problem.mu * cost * math.log(2 * 100 / epsilon))):
            rows = list(zip(contraction, shift, strict=True))
            square = sum(c * (k * k * square - 2 * k * s * first + s * s) for (c, k), s in rows)
            first = sum(c * (k * first - s) for (c, k), s in rows)
        assert square <= epsilon


def test_the_cap_on_noise_bounds_the_step_size_from_below() -> None:
    sampling = Nice(fixture().constants())
    free, capped = (sampling_lr(sampling, 1, mu=2.5, epsilon=0.01, **more) for more in ({}, {"most_noise": 1.0}))  # pyright: ignore[reportArgumentType]
    assert free == pytest.approx(0.5 * 0.01 * 2.5 / (2 * 13.475))
    assert capped == pytest.approx(0.5 * 0.01 * 2.5 / 1.0)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 1))
def test_inclusion_is_proportional_below_one_and_sums_to_the_batch(weights: list[float], share: float) -> None:
    chances, batch = inclusion(weights, share * len(weights)), share * len(weights)
    assert chances.sum() == pytest.approx(batch)
    assert (chances <= 1).all()
    ratios = chances / np.asarray(weights)
    below = chances < 1 - 1e-9
    assert ratios[below] == pytest.approx(ratios[below][:1].repeat(below.sum()))
    if below.any():
        assert (ratios[~below] <= ratios[below].max() * (1 + 1e-9)).all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_shares_sum_to_the_batch_and_are_exact_if_they_can_be(sizes: list[int], data: st.DataObject) -> None:
    batch = data.draw(st.integers(len(sizes), sum(sizes)))
    found = shares(sizes, batch)
    assert sum(found) == batch
    assert all(1 <= k <= n for k, n in zip(found, sizes, strict=True))
    if all(batch * size % sum(sizes) == 0 for size in sizes):
        assert found == [batch * size // sum(sizes) for size in sizes]


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: Part(smoothness=1, each=[1.0], squares=[1.0, 2.0]), "each has 1 numbers and squares 2"),
        (lambda: Part(smoothness=3, each=[1.0, 2.0], squares=[1.0, 2.0]), r"max\(each\)=2.0 must lie between"),
        (lambda: Part(smoothness=1, each=[1.0], squares=[1.0], mean_sq=2), "mean_sq=2 must lie between 0"),
        (lambda: PartitionNice(fixture().parts, (0.5, 0.4)), "must sum to 1"),
        (lambda: inclusion([1.0, 1.0], 3), "batch=3 is more than the 2 samples"),
        (lambda: shares([2, 2], 1), "batch=1 must lie between the number of parts, 2"),
    ],
)
def test_constants_that_cannot_be_are_refused(build: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        build()  # pyright: ignore[reportCallIssue, reportUnknownVariableType]
