"""What the torch engine measures against gradients taken by hand, and against a problem whose noise is known."""

import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from test_torch_engine import loss, micro_batches, model, plan
from torch import Tensor, nn

from distgrow.core.noise_stats import Measured, Noise
from distgrow.core.plan import Plan
from distgrow.engine.noise.hooks import MicroBatchNorms, inner
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.optim import Optimizer
from distgrow.optim.adamw import AdamW
from distgrow.optim.groups import ParameterGroup
from distgrow.optim.sgd import SGD

DOUBLE = Torch(precision="float64")
OPTIMIZERS = [
    SGD(),
    SGD(weight_decay=0.3, clip=0.5),
    SGD(momentum=0.9, weight_decay=0.3, clip=0.5),
    SGD(momentum=0.5, nesterov=True),
    AdamW(beta2=0.95),
    AdamW(weight_decay=0.3, clip=0.5),
]


def engine(optimizer: Optimizer) -> TorchEngine:
    return TorchEngine(model(), loss, spec=DOUBLE, optimizer=optimizer)


def measured_plan(batch: int = 23, max_micro: int = 7) -> Plan:
    """An update that is measured in every way."""
    return replace(plan(batch, max_micro), window=100, product=True)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(of: nn.Module, batch: Any) -> Tensor:
    """By hand."""
    return flat(torch.autograd.grad(loss(of, batch), list(of.parameters())))


def by_hand(of: nn.Module, update: Plan, start: int, spec: SGD | AdamW) -> tuple[float, float, Tensor]:
    """The parts' and the batch's squared norms and the batch's gradient, all of the objective with its L2 penalty."""
    penalty = spec.weight_decay if isinstance(spec, SGD) else 0.0
    decay = penalty * flat(of.parameters())
    parts = micro_batches(update, start)
    parts_sq = sum(len(y) * (gradient(of, (x, y)) + decay).square().sum().item() for x, y in parts) / update.batch
    whole = gradient(of, tuple(torch.cat(columns) for columns in zip(*parts, strict=True))) + decay
    return parts_sq, whole.square().sum().item(), whole


def last_directions(spec: SGD | AdamW, stepped: list[Tensor]) -> Tensor:
    """The direction of the last of a series of steps along clipped gradients (with the penalty), by the formulas."""
    if isinstance(spec, SGD):
        direction = torch.zeros_like(stepped[0])
        for taken in stepped:
            direction = spec.momentum * direction + taken
        return direction
    first, second = (torch.zeros_like(stepped[0]) for _ in range(2))
    for taken in stepped:
        first = spec.beta1 * first + (1 - spec.beta1) * taken
        second = spec.beta2 * second + (1 - spec.beta2) * taken**2
    first, second = first / (1 - spec.beta1 ** len(stepped)), second / (1 - spec.beta2 ** len(stepped))
    return first / (second.sqrt() + spec.eps)


def same(one: Measured, other: Measured) -> bool:
    return torch.equal(*(torch.tensor(astuple(found)).nan_to_num(-1.0) for found in (one, other)))


@pytest.mark.parametrize("spec", OPTIMIZERS)
def test_squared_norms_and_products_are_those_of_gradients_taken_by_hand(spec: SGD | AdamW) -> None:
    ours, stepped = engine(spec), list[Tensor]()
    for start in (0, 23, 40):
        update = measured_plan()
        parts_sq, batch_sq, whole = by_hand(ours.model, update, start, spec)
        decay = (spec.weight_decay if isinstance(spec, SGD) else 0.0) * flat(ours.model.parameters())
        found = ours.update(update, micro_batches(update, start))
        assert found.measured.parts_sq == pytest.approx(parts_sq, rel=1e-10)
        assert found.measured.batch_sq == pytest.approx(batch_sq, rel=1e-10)
        assert found.grad_norm == pytest.approx((whole - decay).norm().item(), rel=1e-10)
        if stepped:
            product = torch.dot(whole, last_directions(spec, stepped)).item()
            assert found.measured.product == pytest.approx(product, rel=1e-6)
        else:
            assert math.isnan(found.measured.product)
        clipped = (whole - decay) * min(1.0, (spec.clip or math.inf) / (found.grad_norm + 1e-6))
        stepped.append(clipped + decay)


def test_measuring_moves_nothing() -> None:
    for spec in OPTIMIZERS:
        watched, unwatched = engine(spec), engine(spec)
        for start in (0, 23):
            watched.update(measured_plan(), micro_batches(measured_plan(), start))
            found = unwatched.update(plan(23, 7), micro_batches(plan(23, 7), start))
            assert same(found.measured, Measured())
        assert torch.equal(flat(watched.model.parameters()), flat(unwatched.model.parameters()))


def test_where_nothing_is_measured_no_hook_is_left_and_nothing_kept() -> None:
    ours = engine(SGD())
    ours.update(replace(measured_plan(), product=False), micro_batches(measured_plan(), 0))
    ours.update(plan(23, 7), micro_batches(plan(23, 7), 23))
    assert not any(parameter._backward_hooks for parameter in ours.model.parameters())
    assert not ours.optimizer.state


class Mean(nn.Module):
    """f = E|θ − x|²/2 over x: ∇f = θ − E x, Σ = Cov x."""

    def __init__(self, at: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(at)

    def forward(self, x: Tensor) -> Tensor:
        return (self.theta - x).square().sum(1).mean() / 2


@pytest.mark.parametrize(("batch", "max_micro", "penalty"), [(8, 4, 0.0), (7, 3, 0.5)])
def test_noise_and_gradient_are_estimated_without_bias(batch: int, max_micro: int, penalty: float) -> None:
    at, spread = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 2.0, 0.3]).double()
    ours = TorchEngine(Mean(at.clone()), lambda m, x: m(x), spec=DOUBLE, optimizer=SGD(weight_decay=penalty))
    update = replace(measured_plan(batch, max_micro), lr=0.0, product=False)
    generator, noise = torch.Generator().manual_seed(0), Noise()
    for _ in range(1000):
        rows = torch.randn(batch, 3, generator=generator, dtype=torch.float64) * spread
        found = ours.update(update, [rows[part.start : part.stop] for part in update.rows(0, 0)])
        noise = noise.after(batch, update.parts, 10**9, found.measured)
    assert noise.grad_sq.value == pytest.approx(((1 + penalty) * at).square().sum().item(), abs=4 * noise.grad_sq.error)
    assert noise.variance.value == pytest.approx(spread.square().sum().item(), abs=4 * noise.variance.error)
    assert noise.variance.error < 0.06 * noise.variance.value


def test_as_noise_cancels_so_does_the_product_and_without_noise_it_is_the_gradients_square() -> None:
    still = TorchEngine(Mean(torch.ones(3).double()), lambda m, x: m(x), spec=DOUBLE)
    update = replace(measured_plan(4, 4), lr=0.0)
    rows = torch.zeros(4, 3, dtype=torch.float64)
    assert [still.update(update, [rows]).measured.product for _ in range(2)][1] == pytest.approx(3.0, rel=1e-12)
    assert still.update(update, [rows + 2]).measured.product == pytest.approx(-3.0, rel=1e-12)


def loss_or_fault(of: nn.Module, batch: Any) -> Tensor:
    """The loss; of a batch that begins with 99 there is none, as memory does not hold it."""
    if batch[0][0, 0] == 99:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")
    return loss(of, batch)


@pytest.mark.parametrize("fault", ["not finite", "out of memory", "a probe"])
def test_updates_that_come_to_nothing_leave_no_trace(fault: str) -> None:
    ours, fresh = (TorchEngine(model(), loss_or_fault, spec=DOUBLE, optimizer=SGD(weight_decay=0.1)) for _ in range(2))
    update = measured_plan()
    for one in (ours, fresh):
        one.update(update, micro_batches(update, 0))
    first, (x, y), *rest = micro_batches(update, 23)
    spoilt = {"not finite": x * math.inf, "out of memory": torch.full_like(x, 99), "a probe": x}[fault]
    tried = replace(update, probe=True, window=0, product=False) if fault == "a probe" else update
    outcome = ours.update(tried, [first, (spoilt, y), *rest])
    assert (outcome.applied, outcome.out_of_memory) == (False, fault == "out of memory")
    assert same(outcome.measured, Measured())
    again = [one.update(update, micro_batches(update, 23)).measured for one in (ours, fresh)]
    assert same(*again)
    assert all(map(math.isfinite, astuple(again[0])))


@pytest.mark.parametrize("spec", OPTIMIZERS)
def test_a_saved_and_loaded_engine_goes_on_to_measure_the_same(spec: SGD | AdamW, tmp_path: Path) -> None:
    whole, first, second = (engine(spec) for _ in range(3))
    for one, starts in [(whole, (0, 23)), (first, (0, 23))]:
        for start in starts:
            one.update(measured_plan(), micro_batches(measured_plan(), start))
    for name, kept in first.snapshot().items():
        (tmp_path / name).write_bytes(kept)
    second.load(tmp_path)
    found = [one.update(measured_plan(), micro_batches(measured_plan(), 40)).measured for one in (whole, second)]
    assert same(*found)
    assert all(map(math.isfinite, astuple(found[0])))


class Own(nn.Module):
    """A model of a user's own class, which holds another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.slow
def test_a_compiled_model_shows_the_same_and_is_compiled_no_more_often() -> None:
    counters = torch._dynamo.utils.counters
    plain, compiled = (
        TorchEngine(Own(), loss, spec=Torch(precision="float64", compile=wanted), optimizer=SGD(weight_decay=0.1))
        for wanted in (False, True)
    )
    compiled.update(plan(16, 8), micro_batches(plan(16, 8), 0))
    plain.update(plan(16, 8), micro_batches(plan(16, 8), 0))
    graphs = counters["stats"]["unique_graphs"]
    for start, product in [(16, False), (32, True), (48, True)]:
        update = replace(measured_plan(16, 8), product=product)
        found = [one.update(update, micro_batches(update, start)).measured for one in (plain, compiled)]
        expected, measured = (torch.tensor(astuple(one)) for one in found)
        torch.testing.assert_close(measured, expected, rtol=1e-10, atol=0, equal_nan=True)
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_half_precision_gradients_are_squared_in_single() -> None:
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    parts = MicroBatchNorms([parameter], world=1)
    parts.begin(measured_plan())
    (parameter.float() * 30000.0).sum().backward()  # a norm that float16 does not hold
    parts.end(weight=0.5, scale=2.0)
    total = parts.total()
    assert total is not None
    assert total.item() == pytest.approx(1000 * 30000.0**2 / (0.5 * 2.0**2), rel=1e-6)


def test_complex_parameters_count_as_pairs_of_real_ones() -> None:
    one, other = (torch.randn(3, 2, dtype=torch.complex128) for _ in range(2))
    pairs = zip(torch.view_as_real(one).flatten().tolist(), torch.view_as_real(other).flatten().tolist(), strict=True)
    assert inner(one, other).item() == pytest.approx(sum(a * b for a, b in pairs))
    assert inner(one.conj(), other.conj()).item() == pytest.approx(inner(one, other).item())


# ── in the metric of AdamW's steps ──────────────────────────────────────────────────────────────────────────────


def preconditioner(spec: AdamW, stepped: list[Tensor]) -> Tensor:
    """1/(√v̂ + ε) after a series of steps along clipped gradients, by the formula."""
    second = torch.zeros_like(stepped[0])
    for taken in stepped:
        second = spec.beta2 * second + (1 - spec.beta2) * taken**2
    return 1 / ((second / (1 - spec.beta2 ** len(stepped))).sqrt() + spec.eps)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("max_micro", [7, 12])
def test_squares_in_the_metric_of_adamw_are_those_by_hand(max_micro: int, clip: float | None) -> None:
    """P is that before the step, and clipping moves the steps but not what is measured of a gradient."""
    spec, stepped = AdamW(beta2=0.95, clip=clip), list[Tensor]()
    ours = engine(spec)
    for start in (0, 23, 40):
        update = replace(measured_plan(max_micro=max_micro), preconditioned=True)
        parts = micro_batches(update, start)
        gradients = [gradient(ours.model, part) for part in parts]
        whole = gradient(ours.model, tuple(torch.cat(columns) for columns in zip(*parts, strict=True)))
        found = ours.update(update, micro_batches(update, start))
        if stepped:
            metric = preconditioner(spec, stepped)
            sizes = [len(y) for _, y in parts]
            expected = sum(n * (metric * g**2).sum().item() for n, g in zip(sizes, gradients, strict=True)) / 23
            assert found.measured.parts_sq == pytest.approx(expected, rel=1e-9)
            assert found.measured.batch_sq == pytest.approx((metric * whole**2).sum().item(), rel=1e-9)
        else:
            assert math.isnan(found.measured.batch_sq) and math.isnan(found.measured.parts_sq)  # no step, no metric
        assert found.grad_norm == pytest.approx(whole.norm().item(), rel=1e-10)
        stepped.append(whole * min(1.0, (clip or math.inf) / (found.grad_norm + 1e-6)))


def test_the_scale_of_the_loss_does_not_matter_in_the_metric_of_adamw() -> None:
    """P goes with 1/c where the gradient goes with c, so tr(PΣ)/(GᵀPG) stays."""
    ratios = []
    for scale in (1.0, 100.0):
        update = replace(measured_plan(), preconditioned=True)

        def scaled(of: nn.Module, batch: Any, scale: float = scale) -> Tensor:
            return scale * loss(of, batch)

        ours = TorchEngine(model(), scaled, spec=DOUBLE, optimizer=AdamW(eps=1e-30))
        ours.update(update, micro_batches(update, 0))
        found = ours.update(update, micro_batches(update, 23)).measured
        ratios.append(found.parts_sq / found.batch_sq)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-9)


def test_a_group_that_learns_slower_counts_less_in_the_metric_of_adamw() -> None:
    """P is of the step that is made: where it is a quarter as long, so is gᵀPg; a frozen group counts nothing."""
    squares = []
    for scale in (1.0, 0.25, 0.0):
        spec = AdamW(groups=[ParameterGroup(match=".*", lr_scale=scale)])
        ours, update = engine(spec), replace(measured_plan(), preconditioned=True, lr=1e-12)
        for start in (0, 23):
            found = ours.update(update, micro_batches(update, start)).measured
        squares.append(found.batch_sq)
    assert squares[1] == pytest.approx(squares[0] / 4, rel=1e-6)
    assert squares[2] == 0
