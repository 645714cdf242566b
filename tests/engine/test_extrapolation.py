"""Gradients at a shifted point: against loops by hand, closed forms, and runs at the parameters themselves."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shifted import KINDS, ROW, close, engine_of, lively, of_weight, one, run, same, values, walk
from tiny import data, loss, network
from torch import Tensor, nn

from distgrow import (
    SGD,
    AdamW,
    Extrapolate,
    Muon,
    ParameterGroup,
)
from distgrow.core.plan import Plan
from distgrow.engine.extrapolation import directions_like
from distgrow.optim import OptimizerSpec
from distgrow.theory import extrapolation

# ── the null setting ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(momentum=0.9, nesterov=True, weight_decay=0.01, clip=0.3),
        AdamW(no_decay=True, groups=[ParameterGroup(match="0", lr_scale=0.5)]),
        Muon(),
    ],
    ids=lambda spec: spec.name,
)
def test_a_rate_of_0_is_the_plain_run_to_the_bit(optimizer: OptimizerSpec, tmp_path: Path) -> None:
    plain = lively()
    run(tmp_path / "plain", plain, optimizer=optimizer)
    for name, kind in KINDS.items():
        model = lively()
        run(tmp_path / name, model, optimizer=optimizer, extrapolate=Extrapolate(rate=0, **kind))
        assert same(values(model), values(plain)), name


def test_without_a_step_the_parameters_stay_what_they_are_to_the_bit() -> None:
    for kind, optimizer in itertools.product(KINDS.values(), (SGD(momentum=0.9), AdamW())):
        model = lively()
        engine = engine_of(model, loss, Extrapolate(rate=0.7, **kind), optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        inputs = torch.stack([row for row, _ in data(8)])
        parts = [(inputs[:4], torch.zeros(4, dtype=torch.long)), (inputs[4:], torch.ones(4, dtype=torch.long))]
        for seed in range(3):
            outcome = engine.update(Plan(batch=8, world=1, micro=4, accum=2, lr=0.0, stage=0, seed=seed), parts)
            assert outcome.applied
        assert same([p.detach() for p in model.parameters()], before)


# ── loops by hand ───────────────────────────────────────────────────────────────────────────────────────────────────

BY_HAND: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda given: torch.optim.AdamW(given, lr=0.1, weight_decay=0.1),
}
SPECS: dict[str, OptimizerSpec] = {
    "sgd": SGD(momentum=0.9, nesterov=True, weight_decay=0.01, clip=0.3),
    "adamw": AdamW(weight_decay=0.1, clip=0.3),
}


def shift_of(optimizer: torch.optim.Optimizer, p: Any, gradient: Tensor | None) -> Tensor | float:
    """Return s of a gradient: itself, or over √v̂ + ε of AdamW's state."""
    if gradient is None or isinstance(optimizer, torch.optim.SGD):
        return 0.0 if gradient is None else gradient
    state = optimizer.state[p]
    if not state:
        return 0.0
    return gradient / ((state["exp_avg_sq"] / (1 - 0.999 ** state["step"].item())).sqrt() + 1e-8)


def gradient_by_hand(model: nn.Module, rows: Any) -> list[Tensor]:
    model.zero_grad()
    loss(model, rows).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["past", "fresh"])
@pytest.mark.parametrize("name", SPECS)
def test_shifts_of_the_whole_batch_are_a_loop_by_hand(name: str, kind: Any) -> None:
    rows = [(torch.stack([r for r, _ in data(96)[k : k + 8]]), torch.tensor([0, 1] * 4)) for k in range(0, 96, 8)]
    model = network()
    optimizer, given, past = BY_HAND[name](model.parameters()), list(model.parameters()), [None] * 4
    for batch in rows:
        source: Any = past if kind == "past" else gradient_by_hand(model, batch)
        kept = [p.detach().clone() for p in given]
        with torch.no_grad():
            for p, gradient in zip(given, source, strict=True):
                p -= 0.4 * shift_of(optimizer, p, gradient)
        past = gradient_by_hand(model, batch)
        with torch.no_grad():
            for p, value in zip(given, kept, strict=True):
                p.copy_(value)
        optimizer.step()
    found = network()
    engine = engine_of(found, loss, Extrapolate(kind=kind, rate=0.4), SPECS[name])
    for inputs, labels in rows:
        plan = Plan(batch=8, world=1, micro=4, accum=2, lr=0.1, stage=0)
        engine.update(plan, [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])])
    assert close(values(found), values(model))


@pytest.mark.parametrize("kind", ["fresh", "noise"])
def test_each_group_has_the_shift_of_its_own_gradient_or_directions(kind: Any) -> None:
    """Two groups in one update are the mean of two updates of one group each."""
    inputs, labels = torch.stack([r for r, _ in data(8)]), torch.tensor([0, 1] * 4)
    groups, theta, steps = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])], values(network()), list[list[Tensor]]()
    apart, both = (
        {"batch": 8, "micro": 4, "lr": 1.0, "stage": 0, "seed": 3, "world": 3 - n, "accum": n} for n in (1, 2)
    )
    for rank in (0, 1):  # of two ranks, whose gradients have the weight 1
        model = network()
        engine = engine_of(model, loss, Extrapolate(kind=kind, rate=0.5, local=True, group=4))
        engine.accumulate(Plan(**apart), groups[rank : rank + 1], rank=rank)
        engine.step(Plan(**apart))
        steps.append([a - b for a, b in zip(values(model), theta, strict=True)])
    model = network()
    engine_of(model, loss, Extrapolate(kind=kind, rate=0.5, local=True, group=4)).update(Plan(**both), groups)
    steps.append([a - b for a, b in zip(values(model), theta, strict=True)])
    assert close(steps[2], [(a + b) / 2 for a, b in zip(steps[0], steps[1], strict=True)])
    assert not close(steps[0], steps[1])


# ── closed forms ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rate", "curvature", "lr"), [(0.2, 1.0, 0.3), (0.1, 3.0, 0.9), (0.05, 8.0, 0.3)])
def test_quadratics_shrink_by_the_factors_of_the_theory(rate: float, curvature: float, lr: float) -> None:
    def bowl(w: Tensor) -> Tensor:
        return curvature * w.square() / 2

    fresh = walk(Extrapolate(kind="fresh", rate=rate), bowl, lr, 12)
    factor = extrapolation.fresh_factor(lr, rate, curvature)
    assert fresh == pytest.approx([factor**k for k in range(1, 13)], rel=1e-12)
    past = walk(Extrapolate(kind="past", rate=rate), bowl, lr, 12)
    points, x = [1.0], 1.0  # y_0 = x_0, then the recursion of two steps
    h, shift = lr * curvature, rate * curvature
    points.append((1 - h - shift) * points[0])
    for _ in range(12):
        points.append((1 - h - shift) * points[-1] + shift * points[-2])
    expected = list[float]()
    for point in points[:12]:
        x -= h * point
        expected.append(x)
    assert past == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("kind", ["fresh", "past"])
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_quadratics_diverge_above_the_stability_limit_and_not_below(kind: Any, rate: float) -> None:
    limit = {"fresh": extrapolation.fresh_stability_limit, "past": extrapolation.past_stability_limit}[kind](rate, 1.0)
    curvatures = torch.linspace(0.02, 1.0, 50, dtype=torch.float64)[:, None]
    for share, below in ((0.97, True), (1.03, False)):
        model = nn.Linear(1, 50, bias=False).double()
        nn.init.ones_(model.weight)
        walk(
            Extrapolate(kind=kind, rate=rate), lambda w: (curvatures * w.square()).sum() / 2, share * limit, 700, model
        )
        largest = next(model.parameters()).abs().max().item()
        assert largest < 1 if below else largest > 10


@pytest.mark.parametrize("kind", ["fresh", "past"])
def test_updates_follow_the_flow_of_the_penalised_loss_to_second_order(kind: Any) -> None:
    """f = w²/2 + w⁴/4. Halving η and γ̂ divides the distance to the flow of f + c‖∇f‖² by four, to that of f by two.

    γ̂ = η/2 is the midpoint rule, whose c is 0.
    """

    def flow(w: float, penalty: float, time: float) -> float:
        for _ in range(4000):  # c‖∇f‖² adds 2c·f″·f′
            slope = (w + w**3) * (1 + 2 * penalty * (1 + 3 * w**2))
            middle = w - time / 8000 * slope
            w -= time / 4000 * (middle + middle**3) * (1 + 2 * penalty * (1 + 3 * middle**2))
        return w

    for share in (1.0, 0.5, 0.0):
        distances = list[tuple[float, float]]()
        for lr in (0.02, 0.01):
            spec = Extrapolate(kind=kind, rate=share * lr)
            end = walk(spec, lambda w: w.square() / 2 + w**4 / 4, lr, round(1 / lr), one())[-1]
            c = extrapolation.gradient_penalty(lr, share * lr)
            # the first update of `past` has no shift
            distances.append((abs(end - flow(1.0, c, 1.0)), end - flow(1.0, 0.0, 1.0)))
        order = distances[0][0] / distances[1][0]
        if kind == "fresh":
            assert 3.5 < order < 4.6
            signs = {1.0: 1, 0.5: 0, 0.0: -1}[share]
            assert signs == 0 or math.copysign(1, distances[0][1]) == signs
            assert (abs(distances[0][1]) / abs(distances[1][1]) > 3.5) is (share == 0.5)
        else:  # it adds a step of order η² once
            assert order > 3.3


def test_noise_is_as_long_as_its_filter_and_points_anywhere() -> None:
    torch.manual_seed(0)
    like = [
        torch.randn(5, 3, 2, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
        torch.tensor(2.0),
        torch.zeros(2, 2),
    ]
    drawn = [list(directions_like(like, seed)) for seed in range(4000)]
    for each in drawn[:5]:
        assert torch.allclose(each[0].flatten(1).norm(dim=1), like[0].flatten(1).norm(dim=1))
        assert torch.allclose(each[1].norm(), like[1].norm())
        assert abs(each[2].item()) == pytest.approx(2.0)
        assert not each[3].any()
    vectors = torch.stack([each[1] for each in drawn])
    covariance = vectors.T @ vectors / len(vectors)
    expected = like[1].square().sum() / 4 * torch.eye(4, dtype=torch.float64)
    assert torch.allclose(covariance, expected, atol=5 * expected.max().item() / math.sqrt(4000))
    assert vectors.mean(0).norm() < 5 * like[1].norm() / math.sqrt(4000)
    assert len({each[0].sum().item() for each in drawn}) == 4000


def test_symmetric_noise_adds_its_variance_to_the_gradient_of_a_fourth_power() -> None:
    """E(w − ζ)³ = w³ + 3w·Var ζ; ζ = ±γ̂w of one number, so both values are known."""
    weight, rate = 1.5, 0.4
    both = [(weight * (1 - rate)) ** 3, (weight * (1 + rate)) ** 3]
    wanted = weight**3 + 3 * weight * (rate * weight) ** 2
    assert sum(both) / 2 == pytest.approx(wanted)
    power = of_weight(lambda w: w**4 / 4)
    alone = engine_of(one(weight), power, Extrapolate(kind="noise", rate=rate))
    seen = [
        alone.update(Plan(batch=1, world=1, micro=1, accum=1, lr=0.0, stage=0, seed=seed), [ROW]).grad_norm
        for seed in range(400)
    ]
    low = sum(norm == pytest.approx(both[0], rel=1e-12) for norm in seen)
    assert low + sum(norm == pytest.approx(both[1], rel=1e-12) for norm in seen) == 400
    assert 150 < low < 250
    groups = engine_of(one(weight), power, Extrapolate(kind="noise", rate=rate, local=True, group=1))
    mean = groups.update(Plan(batch=900, world=1, micro=1, accum=900, lr=0.0, stage=0, seed=1), [ROW] * 900).grad_norm
    assert mean == pytest.approx(wanted, abs=4 * (both[1] - both[0]) / 2 / math.sqrt(900))


@pytest.mark.parametrize("kind", ["past", "fresh", "fresh in groups"])
def test_a_shift_by_gradients_fades_as_the_batch_grows_unless_groups_stay_as_large(kind: str) -> None:
    """Gradients are rows of variance 1: the mean square of ζ is γ̂²/b, or γ̂²/r in groups of r."""
    rate, numbers = 0.1, torch.Generator().manual_seed(0)
    for batch in (4, 32):
        model, seen = one(0.0), list[float]()

        def slope(model: nn.Module, rows: Any, seen: list[float] = seen) -> Tensor:
            seen.append(next(model.parameters()).item())
            return model(rows[0]).mean()

        spec = Extrapolate(rate=rate, **KINDS[kind])
        engine = engine_of(model, slope, spec)
        micro = spec.group or batch
        plan = Plan(batch=batch, world=1, micro=micro, accum=batch // micro, lr=0.0, stage=0)
        for _ in range(200):
            rows = torch.randn(batch, 1, generator=numbers, dtype=torch.float64)
            engine.update(plan, [(part, torch.zeros(len(part))) for part in rows.split(micro)])
        shifted = torch.tensor([value for value in seen if value != 0])
        expected = extrapolation.shift_variance(rate, 1.0, micro)
        assert shifted.square().mean().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / 199))


# ── what two passes leave alone ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["fresh", "fresh in groups"])
def test_both_passes_draw_the_same_and_only_the_second_moves_batchnorm(kind: str) -> None:
    draws, model = list[float](), lively()

    def drawing(model: nn.Module, batch: Any) -> Tensor:
        draws.append(torch.rand(()).item())
        return loss(model, batch)

    engine = engine_of(model, drawing, Extrapolate(rate=0.3, **KINDS[kind]))
    inputs, labels = torch.stack([r for r, _ in data(8)]), torch.tensor([0, 1] * 4)
    parts = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
    for seed in range(2):
        draws.clear()
        engine.update(Plan(batch=8, world=1, micro=4, accum=2, lr=0.0, stage=0, seed=seed), parts)
        first, second = (draws[:2], draws[2:]) if kind == "fresh" else (draws[::2], draws[1::2])
        assert first == second
        assert first[0] != first[1]
    norm: Any = list(model.children())[1]
    assert norm.num_batches_tracked.item() == 4  # two micro-batches of two updates
    again = lively()
    plain = engine_of(again, loss, None)
    for seed in range(2):
        plain.update(Plan(batch=8, world=1, micro=4, accum=2, lr=0.0, stage=0, seed=seed), parts)
    moved: Any = list(again.children())[1]
    assert not torch.equal(norm.running_mean, moved.running_mean)  # it saw the shifted layer before it
