"""Gradients that are applied τ updates late: against loops written by hand, closed forms, and runs without a delay."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import data, loss, network
from torch import Tensor, nn

from distgrow import (
    CLARS,
    SGD,
    AdamW,
    AtGrowth,
    EndRun,
    Hook,
    RunSpec,
    Torch,
    budget,
    constant_lr,
    ema,
    every,
    exponential,
    fit,
    load_weights,
    progress_test,
    sqrt_lr,
)
from distgrow.checkpoint.spec import Checkpointing
from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.engine.torch import TorchEngine
from distgrow.optim import OptimizerSpec
from distgrow.optim.lamb import LAMB
from distgrow.planning.check import problems
from distgrow.theory.staleness import momentum_stability_limit
from distgrow.training.spec import Evaluation

SPECS: dict[str, OptimizerSpec] = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9, nesterov=True, weight_decay=0.01, clip=0.3),
    "adamw": AdamW(weight_decay=0.1),
}
BY_HAND: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
}
#: Batches and learning rates of three stages.
UPDATES = [(4, 0.1)] * 4 + [(8, 0.15)] * 3 + [(16, 0.2)] * 2
DELAYED = Torch(precision="float64", delay=2)


def batch_of(rows: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([row for row, _ in rows]), torch.tensor([label for _, label in rows])


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def by_hand(name: str, delay: int, *, clip: float | None, skip: int | None = None) -> list[Tensor]:
    """Return the parameters after UPDATES, each gradient `delay` updates late; update `skip` is left out."""
    model, rows, start = network(), data(96), 0
    optimizer, queue = BY_HAND[name](model.parameters()), deque[Any]()

    def step(gradient: list[Tensor], lr: float) -> None:
        for parameter, value in zip(model.parameters(), gradient, strict=True):
            parameter.grad = value
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    for k, (batch, lr) in enumerate(UPDATES):
        optimizer.zero_grad()
        loss(model, batch_of(rows[start : start + batch])).backward()
        start += batch
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if k != skip:
            queue.append(([p.grad.clone() for p in model.parameters() if p.grad is not None], lr))
        if k != skip and len(queue) > delay:
            step(*queue.popleft())
    while queue:
        step(*queue.popleft())
    return values(model)


def by_engine(name: str, delay: int, *, accum: int = 1, skip: int | None = None) -> list[Tensor]:
    model, rows, start = network(), data(96), 0
    updates = count()

    def poisoned(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * (float("nan") if next(updates) == skip else 1.0)

    engine = TorchEngine(model, poisoned, spec=Torch(precision="float64", delay=delay), optimizer=SPECS[name])
    for k, (batch, lr) in enumerate(UPDATES):
        plan = Plan(batch=batch, world=1, micro=batch // accum, accum=accum, lr=lr, stage=0)
        outcome = engine.update(plan, [batch_of(rows[part.start : part.stop]) for part in plan.rows(start, 0)])
        assert outcome.applied is (k != skip)
        start += batch
    assert engine.drain() is (delay > 0)
    assert not engine.drain()
    return values(model)


@pytest.mark.parametrize("delay", [0, 1, 3, 20])
@pytest.mark.parametrize("name", SPECS)
def test_a_delayed_engine_is_a_loop_with_a_queue(name: str, delay: int) -> None:
    expected = by_hand(name, delay, clip=SPECS[name].clip)
    for accum in (1, 2):
        found = by_engine(name, delay, accum=accum)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(found, expected, strict=True))
        same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert same or name != "sgd" or accum > 1  # other steps are other kernels than by hand


def test_a_gradient_that_is_not_finite_never_gets_in_flight() -> None:
    expected = by_hand("momentum", 2, clip=0.3, skip=3)
    found = by_engine("momentum", 2, skip=3)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, expected, strict=True))


def linear(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradients do not depend on the parameters."""
    return model(batch[0]).mean()


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def run(folder: Path, model: nn.Module, engine: Torch, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "growth": exponential(4, 2, 16), "stages": every(samples=40), "lr": sqrt_lr(0.05),
        "budget": budget(samples=150), "run": RunSpec(dir=str(folder)), **more,
    }  # fmt: skip
    return fit(model, settings.pop("loss", loss), settings.pop("train", data()), engine=engine, **settings)


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(momentum=0.9, weight_decay=0.1, clip=0.2),
        AdamW(at_growth=AtGrowth(beta2="samples", weight_decay="samples", moments="reset")),
        LAMB(),
    ],
    ids=lambda spec: spec.name,
)
def test_gradients_that_do_not_depend_on_parameters_make_the_same_run_and_average_whatever_the_delay(
    optimizer: OptimizerSpec, tmp_path: Path
) -> None:
    found: list[list[Tensor]] = []
    for delay in (0, 1, 4, 1000):
        model, folder = line(), tmp_path / f"{delay}"
        engine = Torch(precision="float64", delay=delay)
        result = run(folder, model, engine, loss=linear, optimizer=optimizer, average=ema(samples=40))
        assert result.progress.ledger.applied == result.progress.ledger.total == 150
        found.append(values(model))
        load_weights(model, folder, average=True)
        found[-1] += values(model)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_parameters_after_update_t_have_taken_in_all_gradients_but_the_last_ones() -> None:
    """Constant gradient c and lr η: θ_t = θ₀ − η·c·max(0, t − τ), and drained θ₀ − η·c·t."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    engine = TorchEngine(model, linear, spec=Torch(precision="float64", delay=3), optimizer=SGD())
    plan = Plan(batch=2, world=1, micro=2, accum=1, lr=0.25, stage=0)
    for t in range(1, 7):
        outcome = engine.update(plan, [(torch.full((2, 1), 2.0, dtype=torch.float64), torch.zeros(2))])
        assert outcome.applied
        assert outcome.delay == 3
        assert model.weight.item() == -0.5 * max(0, t - 3)
    engine.drain()
    assert model.weight.item() == -0.5 * 6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_a_quadratic_diverges_above_the_stability_limit_and_not_below(delay: int, momentum: float) -> None:
    def half_square(model: nn.Module, batch: Any) -> Tensor:
        return 3.0 * next(model.parameters()).square().sum() / 2 + 0 * batch[0].sum()

    ends: list[float] = []
    for share in (0.95, 1.05):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(model.weight)
        spec, optimizer = Torch(precision="float64", delay=delay), SGD(momentum=momentum)
        engine = TorchEngine(model, half_square, spec=spec, optimizer=optimizer)
        lr = share * momentum_stability_limit(delay, momentum) / 3.0
        plan = Plan(batch=1, world=1, micro=1, accum=1, lr=lr, stage=0)
        for _ in range(1500):
            engine.update(plan, [(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1))])
        ends.append(abs(model.weight.item()))
    assert ends[0] < 0.2
    assert ends[1] > 5


def test_a_run_shorter_than_the_delay_applies_gradients_of_its_first_parameters(tmp_path: Path) -> None:
    model, rows = network(), data(24)
    start, settings = values(model), {"train": rows, "optimizer": SGD(), "lr": constant_lr(0.5)}
    loss(model, batch_of(rows)).backward()  # 24 rows are both updates' batches, in whatever order
    expected = [a - 2 * 0.5 * p.grad for a, p in zip(start, model.parameters(), strict=True) if p.grad is not None]
    model.zero_grad()
    result = run(
        tmp_path, model, Torch(precision="float64", delay=5), **settings, growth=exponential(12, 2, 12), stages=None,
        budget=budget(samples=24),
    )  # fmt: skip
    assert (result.progress.step, result.progress.ledger.applied) == (2, 24)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(values(model), expected, strict=True))


def test_the_last_checkpoint_holds_the_parameters_of_the_end_though_one_of_that_update_was_there(
    tmp_path: Path,
) -> None:
    model, other = network(), network()
    spec = RunSpec(dir=str(tmp_path), checkpoint=Checkpointing(every_steps=1, keep=99))
    run(tmp_path, model, DELAYED, run=spec)
    load_weights(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))
    newest = max((tmp_path / "checkpoints").iterdir())
    kept = torch.load(newest / "engine.pt", weights_only=True)
    assert "delayed" not in kept  # nothing is in flight


class Ends(Hook):
    """Ends the run at its first evaluation."""

    def after_eval(self, evaluation: Any) -> EndRun:
        """End it."""
        return EndRun("enough")


def test_a_run_that_a_hook_ends_at_an_evaluation_gives_the_metrics_of_its_last_parameters(tmp_path: Path) -> None:
    model, rows = network(), data(16)
    spec = RunSpec(dir=str(tmp_path), eval=Evaluation(every_steps=4))
    result = run(tmp_path, model, DELAYED, run=spec, test=rows, hooks=[Ends()])
    assert result.progress.step == 4
    assert result.metrics["loss"] == pytest.approx(loss(model, batch_of(rows)).item(), rel=1e-9)


def test_a_retry_in_smaller_micro_batches_and_trials_of_memory_leave_what_is_in_flight(tmp_path: Path) -> None:
    def tight(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) > 4 and torch.is_grad_enabled() and model.training:
            raise MemoryError("no more than 4 rows")
        return loss(model, batch)

    found: list[list[Tensor]] = []
    for number, (function, micro) in enumerate(((loss, 4), (tight, 64), (tight, "auto"))):
        model = network()
        engine = Torch(precision="float64", delay=3, max_micro=micro)  # pyright: ignore[reportArgumentType]
        result = run(tmp_path / f"{number}", model, engine, loss=function)
        assert result.progress.ledger.applied == 150
        assert (result.progress.ledger.discarded > 0) is (number == 1)
        found.append(values(model))
    assert all(torch.allclose(a, b, rtol=1e-10) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("delay", [0, 2])
def test_lines_of_updates_tell_a_delay_only_if_there_is_one(delay: int, tmp_path: Path) -> None:
    run(tmp_path, network(), Torch(precision="float64", delay=delay))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = {line.get("delay") for line in lines if line["event"] == "step"}
    assert told == {delay or None}
    assert not any("delay" in line for line in lines if line["event"] != "step")


def test_a_resumed_run_keeps_its_delay_and_needs_the_same_one(tmp_path: Path) -> None:
    run(tmp_path, network(), DELAYED)
    with pytest.raises(ConfigError, match=r"engine.delay: 2 in the folder, 1 now"):
        run(tmp_path, network(), Torch(precision="float64", delay=1), resume=True)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"optimizer": CLARS()}, r"engine.delay=2.*optimizer.kind=clars"),
        ({"growth": progress_test(start=4, cap=32), "stages": None}, r"engine.delay=2.*growth.kind=progress_test"),
    ],
)
def test_what_pairs_a_gradient_with_its_update_is_refused(settings: dict[str, Any], keys: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=keys):
        run(tmp_path, network(), DELAYED, **settings)


def test_deepspeed_and_negative_delays_are_refused() -> None:
    base = {"growth": {"kind": "constant"}, "budget": {"epochs": 1}}
    with pytest.raises(ConfigError, match=r"engine.*delay=2.*deepspeed.*kind=torch"):
        parse(apply(base, "engine={kind: deepspeed, delay: 2}"))
    with pytest.raises(ConfigError, match=r"engine.delay=-1"):
        parse(apply(base, "engine.delay=-1"))


@pytest.mark.parametrize(
    ("delay", "momentum", "lr", "stable"),
    [
        (0, 0.0, 0.19, True), (1, 0.0, 0.19, False), (1, 0.0, 0.09, True), (5, 0.0, 0.03, False),
        (1, 0.9, 0.0099, True), (1, 0.9, 0.0101, False), (0, 0.9, 0.37, True),
    ],
)  # fmt: skip
def test_a_plan_refuses_a_learning_rate_that_its_delay_makes_unstable(
    delay: int, momentum: float, lr: float, stable: bool
) -> None:
    """L = 10: the limits are 2/10, 1/10 and .28463/10, with momentum .9 and τ = 1 (1 − .9)/10."""
    config = parse(
        {
            "growth": {"kind": "constant", "start": 16}, "budget": {"epochs": 1}, "lr": {"base": lr},
            "engine": {"delay": delay}, "theory": {"smoothness": 10.0, "variance": 1.0, "gap": 1.0, "epsilon": 0.1},
            "optimizer": {"kind": "sgd", "momentum": momentum},
        }
    )  # fmt: skip
    found = problems(config, config.controller(1))
    assert (not found) is stable
    assert stable or ("engine.delay" in found[0] and f"lr={lr:g}" in found[0])
