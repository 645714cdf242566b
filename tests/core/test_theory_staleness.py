"""Formulas of staleness, against brute force: companion matrices, moment recursions and simulation."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from distgrow.theory import staleness

DELAYS = (0, 1, 2, 5, 20)
#: Updates per factor e of delayed least squares at b = 1, by M and τ: (4: …, 16: …) of the specification.
LEAST_UPDATES = {
    4: {0: 4.48, 1: 5.34, 2: 6.13, 4: 7.61, 8: 10.4, 16: 15.6},
    16: {0: 16.5, 1: 17.4, 2: 18.4, 4: 20.1, 8: 23.3, 16: 29.3},
}


def companion(h: float, delay: int) -> NDArray[np.float64]:
    """Return the matrix that takes (θ_t, …, θ_(t−τ)) one update of delayed gradient descent on."""
    matrix = np.eye(delay + 1, k=-1)
    matrix[0, 0] = 1.0
    matrix[0, delay] -= h
    return matrix


def radius(matrix: NDArray[np.float64]) -> float:
    return float(np.max(np.abs(np.linalg.eigvals(matrix))))


@pytest.mark.parametrize("delay", DELAYS)
def test_delayed_descent_is_stable_below_the_limit_and_not_above_it(delay: int) -> None:
    limit = staleness.stability_limit(delay)
    assert radius(companion(limit * 0.9999, delay)) < 1 < radius(companion(limit * 1.0001, delay))


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_descent_with_momentum_is_stable_below_its_limit_and_not_above_it(delay: int, momentum: float) -> None:
    def with_momentum(h: float) -> NDArray[np.float64]:
        matrix = companion(h, max(delay, 1))
        matrix[0] = 0.0
        for place, value in ((0, 1 + momentum), (1, -momentum), (delay, -h)):
            matrix[0, place] += value
        return matrix

    limit = staleness.momentum_stability_limit(delay, momentum)
    assert radius(with_momentum(limit * 0.999)) < 1 < radius(with_momentum(limit * 1.001))


def test_momentum_has_its_closed_forms_without_delay_at_delay_1_and_at_none() -> None:
    for momentum in (0.0, 0.3, 0.9):
        assert staleness.momentum_stability_limit(0, momentum) == pytest.approx(2 * (1 + momentum))
        assert staleness.momentum_stability_limit(1, momentum) == pytest.approx(1 - momentum)
    for delay in DELAYS:
        assert staleness.momentum_stability_limit(delay, 0.0) == pytest.approx(staleness.stability_limit(delay))


def test_the_limits_are_those_of_the_table() -> None:
    limits = [staleness.stability_limit(delay) for delay in DELAYS]
    assert limits == pytest.approx([2, 1, 0.61803, 0.28463, 0.07661], abs=5e-5)


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 7])
def test_no_step_shrinks_the_error_faster_than_the_best(delay: int) -> None:
    best, steps = staleness.best_step(delay), np.linspace(1e-3, staleness.stability_limit(delay), 2001)
    radii = [radius(companion(float(h), delay)) for h in steps]
    assert radius(companion(best, delay)) == pytest.approx(staleness.best_rate(delay), abs=1e-3)  # a double root
    assert min(radii) >= staleness.best_rate(delay) - 1e-6
    assert float(steps[int(np.argmin(radii))]) == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("delay", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.8, 0.99])
def test_the_stationary_variance_solves_the_lyapunov_equation(delay: int, share: float) -> None:
    curvature, variance = 3.0, 0.7
    lr = share * staleness.stability_limit(delay) / curvature
    noise = np.zeros((delay + 1, delay + 1))
    noise[0, 0] = lr**2 * variance
    matrix = companion(lr * curvature, delay)
    covariance = np.linalg.solve(np.eye((delay + 1) ** 2) - np.kron(matrix, matrix), noise.ravel())
    exact = float(covariance[0])
    assert staleness.stationary_variance(curvature, lr, variance, delay) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("h", [0.1, 0.5, 0.9])
def test_the_stationary_variance_has_its_closed_forms_at_delays_0_and_1(h: float) -> None:
    none, one = (staleness.stationary_variance(2.0, h / 2.0, 3.0, delay) for delay in (0, 1))
    assert none == pytest.approx(3.0 / 4.0 * h / (2 - h))
    assert one == pytest.approx(3.0 / 4.0 * h * (1 + h) / ((1 - h) * (2 + h)))
    assert staleness.stationary_variance(2.0, 0.5, 3.0, 1) == math.inf


def moments(lr: float, multiplier: float, delay: int) -> NDArray[np.float64]:
    """Return the linear map of S_jk = E⟨e_(t−j), e_(t−k)⟩ in an update of delayed least squares at b = 1."""
    size = delay + 1
    result = np.zeros((size * size, size * size))
    for column in range(size * size):
        before = np.zeros(size * size)
        before[column] = 1.0
        s = before.reshape(size, size)
        after = np.zeros((size, size))
        after[1:, 1:] = s[:-1, :-1]
        after[0, 1:] = s[0, :-1] - lr * s[delay, :-1]
        after[1:, 0] = s[:-1, 0] - lr * s[:-1, delay]
        after[0, 0] = s[0, 0] - lr * (s[0, delay] + s[delay, 0]) + lr**2 * (1 + multiplier) * s[delay, delay]
        result[:, column] = after.ravel()
    return result


def least_updates(multiplier: float, delay: int) -> float:
    """Return the least updates by which E‖e‖² falls by a factor e, over all learning rates."""
    low, high = 0.0, 1 / (1 + multiplier)
    while high - low > 1e-3 / (1 + multiplier):  # ternary search: it falls, then rises
        one, other = low + (high - low) / 3, high - (high - low) / 3
        if radius(moments(one, multiplier, delay)) < radius(moments(other, multiplier, delay)):
            high = other
        else:
            low = one
    return -1 / math.log(radius(moments((low + high) / 2, multiplier, delay)))


@pytest.mark.parametrize("multiplier", LEAST_UPDATES)
@pytest.mark.parametrize("delay", [0, 1, 2, 4, 8])
def test_the_least_updates_are_those_of_the_table_and_rise_by_three_quarters_a_delay(
    multiplier: int, delay: int
) -> None:
    updates = least_updates(multiplier, delay)
    assert updates == pytest.approx(LEAST_UPDATES[multiplier][delay], rel=0.01)
    assert updates == pytest.approx(multiplier + 1 + 0.77 * delay, rel=0.13)


@pytest.mark.parametrize("multiplier", [2, 3, 4])
def test_updates_have_not_doubled_at_the_critical_delay_and_have_at_twice_that_delay(multiplier: int) -> None:
    critical = round(staleness.critical_delay(multiplier, 0.0, 1.0, batch=1))
    none, there, beyond = (least_updates(multiplier, delay) for delay in (0, critical, 2 * critical))
    assert there < 2 * none < beyond


@pytest.mark.parametrize("multiplier", [1, 4, 16])
@pytest.mark.parametrize("delay", [0, 1, 4, 8])
def test_the_delayed_learning_rate_is_stable_and_within_four_of_the_best_updates(multiplier: int, delay: int) -> None:
    lr = staleness.delayed_lr(1.0, multiplier, 0.0, 1.0, 1.0, delay)
    shrinks = radius(moments(lr, multiplier, delay))
    assert shrinks < 1
    assert -1 / math.log(shrinks) < 4 * least_updates(multiplier, delay)


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_gaussian_least_squares_has_a_multiplier_of_d_plus_1(batch: int) -> None:
    """One update of b samples from a unit error at η = b/(b + d + 1): E‖e‖² is 1 − b/(b + d + 1)."""
    d, trials, rng = 15, 20_000, np.random.default_rng(batch)
    multiplier = d + 1
    lr = staleness.synchronous_lr(1.0, multiplier, 0.0, batch, 1.0)
    assert lr == pytest.approx(batch / (batch + d + 1))
    squares = []
    for _ in range(20):
        rows = rng.standard_normal((trials // 20, batch, d))
        moved = -lr * np.einsum("tbi,tb->ti", rows, rows[:, :, 0]) / batch
        moved[:, 0] += 1.0
        squares.append((moved**2).sum(1))
    sample = np.concatenate(squares)
    expected = 1 - batch / (batch + multiplier)
    assert float(sample.mean()) == pytest.approx(expected, abs=5 * float(sample.std()) / math.sqrt(trials))
    sfo = batch / -math.log(expected)
    assert sfo == pytest.approx({1: 16.49, 4: 17.93, 16: 23.08, 64: 39.77}[batch], abs=0.01)


def test_the_sfo_has_doubled_at_the_critical_batch_and_is_flat_far_below() -> None:
    """SFO is proportional to b + M + 2σ²/ε within a factor of two, so the sum doubles at b_crit."""
    smoothness, multiplier, variance, gap, target = 2.0, 8.0, 3.0, 5.0, 0.25
    critical = staleness.saturation_batch(multiplier, variance, target)
    for batch in (1, 4, critical, 10 * critical):
        sfo = batch * staleness.synchronous_steps(smoothness, multiplier, variance, gap, batch, target)
        bound = 4 * smoothness * gap / target * (batch + critical)
        assert bound / 2 <= sfo <= bound
    assert critical == 8 + 24


@pytest.mark.parametrize("batch", [1, 8, 200])
def test_the_synchronous_steps_reach_the_target_on_a_quadratic_of_that_noise(batch: int) -> None:
    """f = Lθ²/2 and noise M‖G‖² + σ²: the moment recursion is exact, and the mean of E‖G‖² must be below ε."""
    smoothness, multiplier, variance, target, start = 2.0, 8.0, 3.0, 0.25, 4.0
    gap = smoothness / 2 * start**2
    lr = staleness.synchronous_lr(smoothness, multiplier, variance, batch, target)
    steps = math.ceil(staleness.synchronous_steps(smoothness, multiplier, variance, gap, batch, target))
    square, total = start**2, 0.0
    for _ in range(steps):
        gradient = smoothness**2 * square
        total += gradient
        noise = (multiplier * gradient + variance) / batch
        square = (1 - lr * smoothness) ** 2 * square + lr**2 * noise
    assert total / steps <= target


def test_the_learning_rate_is_flat_in_the_delay_up_to_the_critical_one_then_falls_as_its_inverse() -> None:
    smoothness, multiplier, variance, target, batch = 1.0, 10.0, 500.0, 1.0, 4.0
    critical = staleness.critical_delay(multiplier, variance, target, batch)
    rates = [staleness.delayed_lr(smoothness, multiplier, variance, batch, target, delay) for delay in (0, 50)]
    assert rates[0] == rates[1]  # noise decides, well below the critical delay
    assert critical == 127.5
    far = [staleness.delayed_lr(smoothness, multiplier, variance, batch, target, delay) for delay in (10**4, 2 * 10**4)]
    assert far[0] / far[1] == pytest.approx(2, rel=1e-3)


def test_only_gradients_older_than_the_concurrency_are_slowed() -> None:
    lr, smoothness = 0.05, 2.0
    assert staleness.delay_adaptive_lr(lr, smoothness, 8, concurrency=8) == lr
    assert staleness.delay_adaptive_lr(lr, smoothness, 9, concurrency=8) == pytest.approx(1 / 72)
    assert staleness.delay_adaptive_lr(lr, smoothness, 2, concurrency=1) == lr
    with pytest.raises(ValueError, match=r"lr=0.2 .*0.125"):
        staleness.delay_adaptive_lr(0.2, smoothness, 1, concurrency=1)


def test_a_negative_delay_is_refused() -> None:
    with pytest.raises(ValueError, match="delay=-1"):
        staleness.stability_limit(-1)
