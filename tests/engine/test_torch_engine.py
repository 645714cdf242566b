"""The torch engine against hand-written torch."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from distgrow.core.plan import Plan, split
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.optim import Optimizer
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD


def data(rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A regression problem in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, x.square().sum(1)


def model() -> nn.Module:
    """A small network in float64."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Mean squared error over the rows."""
    return F.mse_loss(model(batch[0]).squeeze(-1), batch[1])


def plan(batch: int, max_micro: int, lr: float = 0.05) -> Plan:
    """One process' plan."""
    micro, accum = split(batch, 1, max_micro)
    return Plan(batch=batch, world=1, micro=micro, accum=accum, lr=lr, stage=0)


def micro_batches(plan: Plan, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The plan's rows of the data, in order."""
    x, y = data()
    return [(x[rows.start : rows.stop], y[rows.start : rows.stop]) for rows in plan.rows(start, 0)]


@pytest.mark.parametrize("max_micro", [64, 16, 7, 1])
@pytest.mark.parametrize(
    ("spec", "reference"),
    [
        (SGD(), lambda p: torch.optim.SGD(p, lr=0.1)),
        (
            SGD(momentum=0.9, nesterov=True, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        ),
        (AdamW(beta2=0.95), lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95))),
        (SGD(clip=0.5), lambda p: torch.optim.SGD(p, lr=0.1)),
    ],
)
def test_accumulated_updates_equal_whole_batches_by_hand(spec: Optimizer, reference: Any, max_micro: int) -> None:
    ours, theirs = model(), model()
    engine, optimizer = TorchEngine(ours, loss, spec=Torch(precision="float64"), optimizer=spec), None
    optimizer = reference(theirs.parameters())
    start = 0
    for batch, lr in [(16, 0.05), (16, 0.05), (23, 0.02)]:
        update = plan(batch, max_micro, lr)
        outcome = engine.update(update, micro_batches(update, start))
        x, y = data()
        optimizer.zero_grad()
        value = loss(theirs, (x[start : start + batch], y[start : start + batch]))
        value.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), spec.clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert outcome.loss == pytest.approx(value.item(), rel=1e-12)
        assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-12)
        start += batch
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert engine.evaluations == start


def test_a_non_finite_gradient_moves_nothing() -> None:
    engine = TorchEngine(model(), loss, spec=Torch(precision="float64"), optimizer=SGD(momentum=0.9))
    update = plan(8, 4)
    engine.update(update, micro_batches(update, 0))
    before = copy.deepcopy(engine.model.state_dict())
    (x, y), second = micro_batches(update, 8)
    outcome = engine.update(update, [(x * float("inf"), y), second])
    assert not outcome.applied
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.model.state_dict().items())
    assert engine.update(update, micro_batches(update, 16)).applied


def test_dropout_depends_on_the_plans_seed_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double()

    def losses(seed: int, noise: int) -> float:
        torch.manual_seed(noise)
        engine = TorchEngine(copy.deepcopy(network), loss, spec=Torch(precision="float64"))
        update = replace(plan(8, 4), seed=seed)
        return engine.update(update, micro_batches(update, 0)).loss

    assert losses(1, 10) == losses(1, 11)
    assert losses(1, 10) != losses(2, 10)


def test_a_groups_lr_scale_is_kept() -> None:
    engine = TorchEngine(model(), loss, spec=Torch(precision="float64"))
    engine.optimizer.param_groups[0]["lr_scale"] = 0.5
    twin = TorchEngine(model(), loss, spec=Torch(precision="float64"))
    update = plan(8, 8, lr=0.1)
    engine.update(update, micro_batches(update, 0))
    half = replace(update, lr=0.05)
    twin.update(half, micro_batches(half, 0))
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), twin.model.parameters(), strict=True))


def test_bfloat16_autocasts_and_keeps_float32_parameters() -> None:
    engine = TorchEngine(model().float(), loss, spec=Torch(precision="bfloat16"))
    update = plan(16, 8)
    pairs = [(x.float(), y.float()) for x, y in micro_batches(update, 0)]
    exact = TorchEngine(model().float(), loss).update(update, pairs)
    outcome = engine.update(update, pairs)
    assert outcome.applied
    assert all(parameter.dtype == torch.float32 for parameter in engine.model.parameters())
    assert outcome.loss == pytest.approx(exact.loss, rel=0.02)
    assert outcome.loss != exact.loss


@pytest.mark.slow
def test_a_compiled_model_is_compiled_and_gives_the_same_update() -> None:
    graphs = counters["stats"]["unique_graphs"]
    plain, compiled = (
        TorchEngine(model(), loss, spec=Torch(precision="float64", compile=wanted)) for wanted in (False, True)
    )
    for start in (0, 16):
        update = plan(16, 8)
        plain.update(update, micro_batches(update, start))
        compiled.update(update, micro_batches(update, start))
    assert counters["stats"]["unique_graphs"] > graphs  # also of nn.Sequential, which nn.Module.compile leaves as it is
    for one, other in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_evaluation_is_the_mean_over_rows_and_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)).double()
    engine = TorchEngine(network, loss, spec=Torch(precision="float64"))
    before = copy.deepcopy(network.state_dict())
    x, y = data()
    ragged = [((x[:50], y[:50]), 50), ((x[50:60], y[50:60]), 10), ((x[60:], y[60:]), len(x) - 60), ((x[:1], y[:1]), 0)]
    state = torch.get_rng_state()
    assert engine.evaluate(ragged)["loss"] == pytest.approx(engine.evaluate([((x, y), len(x))])["loss"], rel=1e-12)
    assert torch.equal(state, torch.get_rng_state())
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("spec", [SGD(momentum=0.9), AdamW()])
def test_a_saved_and_loaded_engine_goes_on_bit_identical(spec: Optimizer, tmp_path: Path) -> None:
    def go(engine: TorchEngine, starts: list[int]) -> None:
        for start in starts:
            update = plan(8, 4)
            engine.update(update, micro_batches(update, start))

    whole, first = (TorchEngine(model(), loss, spec=Torch(precision="float64"), optimizer=spec) for _ in range(2))
    go(whole, [0, 8, 16, 24])
    go(first, [0, 8])
    for name, data in first.snapshot().items():
        (tmp_path / name).write_bytes(data)
    second = TorchEngine(model(), loss, spec=Torch(precision="float64"), optimizer=spec)
    second.load(tmp_path)
    go(second, [16, 24])
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


def test_loading_a_checkpoint_executes_nothing(tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "engine.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError):
        TorchEngine(model(), loss).load(tmp_path)
    assert not (tmp_path / "exploded").exists()
