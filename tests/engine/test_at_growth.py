"""Optimizers whose memory follows the batch: steps written out by hand, their directions, resumes, and refusals."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import data, loss, network
from torch import Tensor

from distgrow import (
    LAMB,
    LARS,
    SGD,
    Adadelta,
    AdamW,
    Muon,
    NAdam,
    Parameters,
    RMSprop,
    RunSpec,
    budget,
    every,
    exponential,
    fit,
    own,
    sqrt_lr,
    steps,
)
from distgrow.checkpoint.spec import Checkpointing
from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError
from distgrow.core.optimizer_plan import AtGrowth, OptimizerPlan
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.engine.torch import TorchEngine
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.constant import Constant
from distgrow.growth.schedule import Schedule
from distgrow.optim import OptimizerSpec
from distgrow.optim.direction import MeasuredStep

ALL = AtGrowth(beta2="samples", momentum="samples", weight_decay="samples", moments="reset")
MEMORY = AtGrowth(beta2="samples", momentum="samples", moments="reset")
#: One of each kind of state, with all that can follow the batch there.
SPECS: list[OptimizerSpec] = [
    AdamW(beta2=0.98, weight_decay=0.3, no_decay=True, clip=0.5, at_growth=ALL),
    SGD(momentum=0.9, weight_decay=0.1, at_growth=AtGrowth(momentum="samples", moments="reset")),
    NAdam(beta2=0.98, weight_decay=0.1, at_growth=MEMORY),
    RMSprop(alpha=0.9, momentum=0.5, at_growth=AtGrowth(beta2="samples", moments="reset")),
    Adadelta(rho=0.8, at_growth=AtGrowth(beta2="samples")),
    Muon(exclude=[Parameters(match="2")], at_growth=ALL),
    LAMB(at_growth=MEMORY),
    LARS(trust=0.1, at_growth=AtGrowth(moments="reset")),
]


def plans(spec: OptimizerSpec, growth: GrowthPolicy | None = None) -> list[Plan]:
    """The updates of 64 samples, of a batch of 4, 8, 8, 16 and back to 4."""
    growth = growth or steps([4, 8, 8, 16, 4])
    schedule = Schedule(
        growth=growth, stages=every(steps=2), lr=sqrt_lr(0.03), budget=budget(steps=10), at_growth=spec.at_growth
    )
    controller, progress, found = schedule.controller(80), Progress(), list[Plan]()
    while not controller.done(progress):
        progress = controller.advance(progress)
        found.append(controller.plan(progress))
        progress = controller.after(progress, found[-1], Outcome())
    return found


def batches(found: list[Plan]) -> list[tuple[Tensor, Tensor]]:
    rows = data(sum(plan.batch for plan in found))
    drawn = [[rows.pop() for _ in range(plan.batch)] for plan in found]
    return [(torch.stack([row for row, _ in part]), torch.tensor([label for _, label in part])) for part in drawn]


def stepped(spec: OptimizerSpec) -> list[Tensor]:
    model, found = network(), plans(spec)
    engine = TorchEngine(model, loss, optimizer=spec)
    for plan, batch in zip(found, batches(found), strict=True):
        engine.update(plan, [batch])
    return list(model.parameters())


def by_hand(spec: OptimizerSpec, step: Callable[[Tensor, dict[str, Any], Plan, OptimizerPlan], Tensor]) -> list[Tensor]:
    """Parameters after all updates θ ← θ − step(g, state, …)."""
    model, found = network(), plans(spec)
    states: list[dict[str, Any]] = [{} for _ in model.parameters()]
    for plan, batch in zip(found, batches(found), strict=True):
        model.zero_grad()
        loss(model, batch).backward()
        assert plan.optimizer is not None
        for parameter, state in zip(model.parameters(), states, strict=True):
            assert parameter.grad is not None
            with torch.no_grad():
                parameter -= step(parameter, state, plan, plan.optimizer)
    return list(model.parameters())


def test_adamw_divides_by_the_weights_that_its_moments_hold() -> None:
    def step(p: Tensor, state: dict[str, Any], plan: Plan, how: OptimizerPlan) -> Tensor:
        assert p.grad is not None
        k = plan.batch / 4
        beta1, beta2 = 0.9**k, 0.999**k
        if how.reset:
            state |= {"m": 0.0, "m's": 0.0}
        for moment, beta, new in (("m", beta1, p.grad), ("v", beta2, p.grad**2)):
            state[moment] = beta * state.get(moment, 0.0) + (1 - beta) * new
            state[moment + "'s"] = beta * state.get(moment + "'s", 0.0) + 1 - beta
        decay = 0.3 * k / math.sqrt(k)
        mean, square = state["m"] / state["m's"], state["v"] / state["v's"]
        return plan.lr * (mean / (square.sqrt() + 1e-3) + decay * p)

    spec = AdamW(eps=1e-3, weight_decay=0.3, at_growth=ALL)
    for one, other in zip(stepped(spec), by_hand(spec, step), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_sgds_momentum_is_a_mean_whose_weights_keep_their_sum() -> None:
    def step(p: Tensor, state: dict[str, Any], plan: Plan, how: OptimizerPlan) -> Tensor:
        assert p.grad is not None
        mu, gradient = 0.9 ** (plan.batch / 4), p.grad + 0.1 * p
        before = torch.zeros_like(p) if how.reset else state.get("mean", torch.zeros_like(p))
        state["mean"] = mu * before + (1 - mu) * gradient
        first = plan.batch == 4 and not state.get("begun")
        if first:  # torch begins with the gradient, as if with weight 1 of 1 − μ
            state["begun"], state["mean"] = True, (1 - 0.9) * gradient
        return plan.lr * state["mean"] / (1 - 0.9)

    spec = SPECS[1]
    for one, other in zip(stepped(spec), by_hand(spec, step), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "made", "name"),
    [
        (RMSprop(alpha=0.9, at_growth=AtGrowth(beta2="samples")), torch.optim.RMSprop, "alpha"),
        (Adadelta(rho=0.9, at_growth=AtGrowth(beta2="samples")), torch.optim.Adadelta, "rho"),
    ],
)
def test_other_second_moments_are_torchs_own_with_another_decay(spec: OptimizerSpec, made: Any, name: str) -> None:
    model, found = network(), plans(spec)
    optimizer = made(model.parameters())
    for plan, batch in zip(found, batches(found), strict=True):
        optimizer.param_groups[0] |= {"lr": plan.lr, name: 0.9 ** (plan.batch / 4)}
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    for one, other in zip(stepped(spec), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", [*SPECS[:3], AdamW(weight_decay=0.0, at_growth=MEMORY)], ids=lambda spec: spec.name)
def test_the_direction_is_the_step_that_was_made(spec: OptimizerSpec) -> None:
    model, found = network(), [replace(plan, product=True, window=0) for plan in plans(spec)]
    engine, last = TorchEngine(model, loss, optimizer=spec), None
    measured = isinstance(spec.direction(), MeasuredStep)
    named, penalty = dict(engine._objective.named()), spec.penalties(dict(engine._objective.named()))
    for plan, batch in zip(found, batches(found), strict=True):
        before = {name: p.detach().clone() for name, p in named.items()}
        engine._objective.zero_grad()
        gradients = torch.autograd.grad(loss(model, batch), list(named.values()))
        whole = [g + penalty.get(n, 0.0) * before[n] for n, g in zip(named, gradients, strict=True)]
        product = engine.update(plan, [batch]).measured.product
        if last is not None:
            expected = sum(float((g * u).sum()) for g, u in zip(whole, last, strict=True))
            assert product == pytest.approx(expected, rel=1e-6)
        decoupled = spec.weight_decay if isinstance(spec, AdamW) and not measured else 0.0
        assert plan.optimizer is not None
        decayed = plan.optimizer.weight_decay(decoupled)
        with torch.no_grad():
            last = [(before[n] - p) / plan.lr - decayed * before[n] * (p.dim() > 1) for n, p in named.items()]


def trained(spec: OptimizerSpec, folder: Path, growth: GrowthPolicy, *, resume: bool = False) -> list[Tensor]:
    model = network()
    fit(
        model, loss, data(), test=data(20), growth=growth, stages=every(samples=40), lr=sqrt_lr(0.03),
        budget=budget(samples=200), optimizer=spec, resume=resume,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=1, keep=40)),
    )  # fmt: skip
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_resume_at_growth_and_within_a_stage_is_the_run_that_never_stopped(
    spec: OptimizerSpec, tmp_path: Path
) -> None:
    growth = exponential(4, 2, 16)
    whole = trained(spec, tmp_path, growth)
    assert not equal(whole, trained(spec.model_copy(update={"at_growth": AtGrowth()}), tmp_path / "plain", growth))
    for last in (12, 10):  # the second stage has updates 11 to 15, so step 10 is at growth
        for checkpoint in sorted((tmp_path / "checkpoints").iterdir())[last + 1 :]:
            shutil.rmtree(checkpoint)
        assert equal(whole, trained(spec, tmp_path, growth, resume=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_constant_batch_makes_it_null_to_the_last_bit(spec: OptimizerSpec, tmp_path: Path) -> None:
    plain = spec.model_copy(update={"at_growth": AtGrowth()})
    growth = Constant(start=8)
    assert equal(trained(spec, tmp_path / "a", growth), trained(plain, tmp_path / "b", growth))


def test_an_optimizer_of_ones_own_makes_the_same_steps(tmp_path: Path) -> None:
    growth, found = exponential(4, 2, 16), list[list[Tensor]]()
    for number in range(2):
        model = network()
        mine = torch.optim.AdamW(model.parameters(), lr=0.03, betas=(0.9, 0.98), weight_decay=0.3, fused=True)
        spec = AdamW(beta2=0.98, weight_decay=0.3, at_growth=ALL) if number else own(mine, at_growth=ALL)
        fit(
            model, loss, data(), growth=growth, stages=every(samples=40), lr=sqrt_lr(0.03), budget=budget(samples=200),
            optimizer=spec, run=RunSpec(dir=str(tmp_path / str(number))),
        )  # fmt: skip
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert equal(*found)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("{kind: sgd, at_growth: {momentum: samples}}", "at_growth.momentum=samples.*sgd.*momentum is 0"),
        ("{kind: sgd, momentum: 0.9, at_growth: {beta2: samples}}", "at_growth.beta2=samples.*no beta2.*its momentum"),
        ("{kind: sgd, momentum: 0.9, nesterov: true, at_growth: {momentum: samples}}", "momentum=samples.*nesterov"),
        ("{kind: sgd, weight_decay: 0.1, at_growth: {weight_decay: samples}}", "weight_decay=samples.*L2 penalty"),
        ("{kind: adadelta, at_growth: {moments: reset}}", "moments=reset.*adadelta.*no momentum.*its beta2"),
        ("{kind: rmsprop, momentum: 0.5, at_growth: {momentum: samples}}", "momentum=samples.*dampening.*its beta2"),
        ("{kind: adafactor, at_growth: {beta2: samples}}", "beta2=samples.*adafactor.*no beta2; nothing"),
        ("{kind: lars, at_growth: {momentum: samples}}", "momentum=samples.*lars.*dampening"),
        ("{kind: lamb, at_growth: {weight_decay: samples}}", "weight_decay=samples.*lamb.*scaled.*its momentum, beta2"),
        ("{kind: adamw, at_growth: {beta2: epochs}}", "optimizer.*at_growth.beta2"),
    ],
)
def test_what_cannot_follow_the_batch_is_refused_by_its_key(optimizer: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(apply({"budget": {"epochs": 4}}, f"optimizer={optimizer}"))


@pytest.mark.parametrize(
    ("made", "asked", "said"),
    [
        (torch.optim.Adagrad, AtGrowth(moments="reset"), "moments=reset.*Adagrad.*no momentum"),
        (torch.optim.ASGD, AtGrowth(beta2="samples"), "beta2=samples.*ASGD.*no beta2"),
        (torch.optim.Adam, AtGrowth(weight_decay="samples"), "weight_decay=samples.*Adam.*L2 penalty"),
    ],
)
def test_an_own_optimizer_without_what_is_asked_is_refused(made: Any, asked: AtGrowth, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        own(made(network().parameters()), at_growth=asked)
