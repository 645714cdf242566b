"""Runs whose rows are drawn by coins: empty updates, loaders, lines, and what is refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sampled_runs import N, Numbered, regression, trained
from tiny import loss, network
from torch import nn

from distgrow import (
    SGD,
    AdamW,
    ConfigError,
    Controller,
    Extrapolate,
    RunSpec,
    Schedule,
    Torch,
    budget,
    constant,
    every,
    exponential,
    fit,
    independent_sampling,
    partition_independent_sampling,
)
from distgrow.config.load import apply, parse
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.core.sampling import SamplingSpec
from distgrow.data.loader import DirectLoader, Loader, PrefetchingLoader
from distgrow.data.stream import SampledStream
from distgrow.engine.delayed import plain_plan, plan_of
from distgrow.engine.torch import TorchEngine
from distgrow.integrations.session import GrowthSession
from distgrow.optim import OptimizerSpec
from distgrow.report.log import Log

KINDS: dict[str, SamplingSpec] = {
    "independent": independent_sampling(),
    "partition": partition_independent_sampling([20, 40]),
}
EMPTY = Plan(batch=0, world=1, micro=1, accum=1, lr=0.1, stage=0, expected=4, draw=3)
SOME = Plan(batch=3, world=1, micro=3, accum=1, lr=0.1, stage=0, expected=4, draw=2)
BY_HAND: dict[str, tuple[OptimizerSpec, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (
        SGD(momentum=0.9, weight_decay=0.1),
        lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    "adamw": (AdamW(weight_decay=0.1), lambda given: torch.optim.AdamW(given, lr=0.1, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_empty_update_is_a_step_with_a_gradient_of_zero_and_costs_nothing(name: str) -> None:
    """Three rows out of a mean of four weigh 3/4. Momentum, moments and decay go on in the empty update."""
    spec, make = BY_HAND[name]
    model, found = network(), network()
    rows = (torch.ones(3, 3, dtype=torch.float64), torch.tensor([0, 1, 1]))
    optimizer, engine = (
        make(model.parameters()),
        TorchEngine(found, loss, spec=Torch(precision="float64"), optimizer=spec),
    )
    progress = Progress()
    for plan, batches in ((EMPTY, [None]), (SOME, [rows]), (EMPTY, [None])):
        optimizer.zero_grad()
        value = loss(model, rows) * (0.75 if plan.batch else 0)
        value.backward()
        optimizer.step()
        outcome = engine.update(plan, batches)
        before, progress = progress, progress.after(plan, outcome)
        assert outcome.applied
        assert outcome.loss == pytest.approx(value.item(), rel=1e-12)
        assert (outcome.grad_norm > 0) is (plan.batch > 0)
        assert progress.step == before.step + 1
        assert progress.ledger.total - before.ledger.total == plan.batch
    for one, other in zip(model.parameters(), found.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)
    assert engine.evaluations == progress.samples == 3


def control(sampling: SamplingSpec, max_micro: int = 64) -> Controller:
    return Controller(
        growth=exponential(2, 2, 8), stages=every(samples=60), budget=budget(samples=240), epoch=N,
        max_micro=max_micro, sampling=sampling,
    )  # fmt: skip


def drawn(loader: Loader, control: Controller, skip: tuple[int, ...]) -> list[Any]:
    """What every micro-batch of a run holds; updates numbered in `skip` are not applied."""
    progress, found = Progress(), list[Any]()
    for update in itertools.count():
        if control.done(progress):
            return found
        progress = control.advance(progress)
        plan = control.plan(progress)
        batches = list(loader.draw(progress, plan))
        assert [0 if batch is None else len(batch) for batch in batches] == plan.sizes(0)
        found += [None if batch is None else batch.tolist() for batch in batches]
        progress = control.after(progress, plan, Outcome(applied=update not in skip or not plan.batch))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_loader_processes_draw_what_is_drawn_without_them_also_where_an_update_is_empty_or_skipped(kind: str) -> None:
    stream, own = SampledStream(Numbered(), KINDS[kind]), control(KINDS[kind], max_micro=3)
    direct = drawn(DirectLoader(stream, 0), own, skip=(2, 9, 10))
    assert None in direct
    ahead = PrefetchingLoader(stream, 0, own, workers=2, prefetch=2, pin=False)
    assert drawn(ahead, own, skip=(2, 9, 10)) == direct


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_with_the_same_coins(kind: str, tmp_path: Path) -> None:
    whole, result = trained(tmp_path, "whole", 400, KINDS[kind])
    assert 400 <= result.progress.ledger.applied == result.progress.ledger.total == result.progress.samples
    trained(tmp_path, "parts", 112, KINDS[kind])
    resumed, result = trained(tmp_path, "parts", 400, KINDS[kind], resume=True)
    assert torch.equal(whole, resumed)
    late, _ = trained(tmp_path, "late", 400, KINDS[kind], engine=Torch(precision="float64", delay=2))
    assert not torch.equal(whole, late)


def test_a_run_that_begins_with_an_empty_update_has_lines_that_the_report_reads(tmp_path: Path) -> None:
    model, sampling = nn.Linear(1, 1).double(), independent_sampling()
    seed = next(k for k in range(100) if not sampling.size(N, k, 0, 0, 2))
    result = fit(
        model, regression, Numbered(), growth=constant(2), budget=budget(samples=20), sampling=sampling,
        run=RunSpec(dir=str(tmp_path), seed=seed),
    )  # fmt: skip
    log = Log(tmp_path / "metrics.jsonl")
    assert log.advance()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert steps[0]["step"] > 1
    assert steps[-1]["step"] == result.progress.step
    assert sum(line["drawn"] for line in steps) == result.progress.ledger.applied
    assert {line["batch"] for line in steps} == {2}


def test_plans_in_flight_of_earlier_checkpoints_are_read() -> None:
    plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0)
    old = {name: value for name, value in plain_plan(plan).items() if name not in ("expected", "draw")}
    assert plan_of(old) == plan


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"growth": None}, "growth.kind=auto decides by what it measures"),
        ({"items": len}, "items say that the loss is a mean over something else.*kind=nice"),
        ({"model": nn.BatchNorm1d(1)}, "a random number of rows.*BatchNorm cannot train on one value"),
        ({"extrapolate": Extrapolate(kind="past", rate=0.1, local=True)}, "extrapolate.local=true.*kind=nice"),
        ({"run": {"noise": {"every": 1}}}, "run.noise.every=1 measures noise.*sampling.kind=independent"),
    ],
)
def test_what_cannot_go_with_a_random_size_is_refused(settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    own = {"growth": constant(4), **settings}
    own = {name: value for name, value in own.items() if value is not None}
    given = RunSpec(**{"dir": str(tmp_path / "run"), **own.pop("run", {})})
    model = nn.Sequential(nn.Linear(1, 1), own.pop("model", nn.Identity())).double()
    with pytest.raises(ConfigError, match=why):
        growth = own.pop("growth", parse({"budget": {"samples": 8}}).growth)
        fit(
            model, regression, Numbered(), growth=growth, budget=budget(samples=8),
            sampling=independent_sampling(), run=given, **own,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["deepspeed", "async"])
def test_other_engines_and_trainers_are_refused(kind: str) -> None:
    base = {"growth": {"kind": "constant"}, "budget": {"epochs": 1}, "engine": {"kind": kind}}
    with pytest.raises(ConfigError, match=rf"sampling.kind=independent.*engine.kind={kind}.*engine.kind=torch"):
        parse(apply(base, "sampling={kind: independent}"))
    schedule = Schedule(growth=constant(6), budget=budget(samples=12), sampling=independent_sampling())
    with pytest.raises(ConfigError, match="sampling draws updates of any size"):
        GrowthSession(schedule.controller(N), Numbered())
