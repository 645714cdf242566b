"""Asynchronous workers: against plain training, fixed delays, closed forms of scripted orders, and their own counts."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Death, Script, dying, hold_back, in_turn, scripted
from small_models import Drawing, line
from tiny import data, loss, network
from torch import Tensor, nn

from distgrow import (
    CLARS,
    SGD,
    AdamW,
    Async,
    AtGrowth,
    Hook,
    RunSpec,
    Torch,
    budget,
    constant,
    constant_lr,
    ema,
    every,
    exponential,
    fit,
    load_weights,
    sqrt_lr,
)
from distgrow.checkpoint.spec import Checkpointing
from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError, Diverged, TrainingFailed
from distgrow.core.plan import Plan
from distgrow.core.progress import Lost, Outcome, Progress, Withdrawn
from distgrow.distributed.world import World
from distgrow.report.log import Log
from distgrow.verify import verify


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(one, other, strict=True))


def run(folder: Path, model: nn.Module, engine: Any, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "growth": exponential(4, 2, 16), "stages": every(samples=40), "lr": sqrt_lr(0.05),
        "budget": budget(samples=150), "run": RunSpec(dir=str(folder)), **more,
    }  # fmt: skip
    return fit(model, settings.pop("loss", loss), settings.pop("train", data()), engine=engine, **settings)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    every_line = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every_line if line["event"] == kind]


def linear(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradients do not depend on the parameters, so that no order of batches matters."""
    return model(batch[0]).mean()


class Counter:
    """A loss that counts the rows it is computed of in training."""

    def __init__(self, base: Any = linear) -> None:
        self.base, self.rows = base, 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.rows += len(batch[0]) if model.training and torch.is_grad_enabled() else 0
        return self.base(model, batch)

    def __deepcopy__(self, _: Any) -> "Counter":
        return self  # that of the workers is this one


@pytest.mark.parametrize(
    "optimizer", [SGD(momentum=0.9, weight_decay=0.1, clip=0.2), AdamW(weight_decay=0.1)], ids=lambda spec: spec.name
)
def test_one_worker_is_plain_training_to_the_last_bit(optimizer: Any, tmp_path: Path) -> None:
    found: list[list[Tensor]] = []
    for name, engine in (
        ("torch", Torch(precision="float64", max_micro=8)),
        ("async", scripted(workers=1, max_micro=8)),
    ):
        model = Drawing()
        result = run(tmp_path / name, model, engine, optimizer=optimizer, average=ema(samples=40), test=data(16))
        assert result.progress.ledger.applied == result.progress.ledger.total == 150
        found.append([*values(model), *model.buffers(), torch.tensor(result.metrics["loss"])])
        load_weights(model, tmp_path / name, average=True)
        found[-1] += values(model)
    assert same(*found)
    told = [[(s["step"], s["loss"], s["grad_norm"], s["lr"], s["sfo"]) for s in lines(tmp_path / name, "step")]
            for name in ("torch", "async")]  # fmt: skip
    assert told[0] == told[1]


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_that_answer_in_turn_are_a_fixed_delay_of_one_less_than_there_are(workers: int, tmp_path: Path) -> None:
    found: list[list[Tensor]] = []
    for name, engine in (
        ("torch", Torch(precision="float64", delay=workers - 1)),
        ("async", scripted(workers=workers)),
    ):
        model = network()
        run(tmp_path / name, model, engine, optimizer=SGD(momentum=0.5), average=ema(samples=40))
        found.append(values(model))
        load_weights(model, tmp_path / name, average=True)
        found[-1] += values(model)
    assert same(*found)
    delays = [step.get("delay") for step in lines(tmp_path / "async", "step")]
    ages = [min(k, workers - 1) for k in range(len(delays) - workers + 1)]  # the first ones see the first parameters
    assert delays == [None] * (workers - 1) + [age or None for age in ages]


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_late_gradient_is_applied_at_the_learning_rate_that_its_delay_allows(adaptive: bool, tmp_path: Path) -> None:
    """Constant gradient c: θ = θ₀ − c·Σ η·factor. Job 3 sees 2 updates and comes after 9: its delay is 7 > τ_C = 2."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    rows = [(torch.full((1,), 2.0, dtype=torch.float64), 0) for _ in range(40)]
    engine = scripted(hold_back(3, until=10), workers=2, adaptive=adaptive)
    run(
        tmp_path, model, engine, loss=linear, train=rows, optimizer=SGD(), growth=constant(2), stages=None,
        lr=constant_lr(0.25), budget=budget(samples=40),
    )  # fmt: skip
    delays = [step.get("delay", 0) for step in lines(tmp_path, "step")]
    late = max(delays)
    assert late == 7
    assert sorted(delays)[-2] <= 2
    factor = 2 / 7 if adaptive else 1.0
    assert model.weight.item() == pytest.approx(-0.25 * 2.0 * (19 + factor), rel=1e-14)


@pytest.mark.parametrize("growth", [constant(4), exponential(4, 2, 16)], ids=["constant", "growing"])
def test_a_dropped_gradient_is_discarded_and_the_budget_is_met_by_others(growth: Any, tmp_path: Path) -> None:
    counter, model = Counter(), line()
    engine = scripted(hold_back(3, until=14), workers=3, drop_after=3)
    stages = None if growth.kind == "constant" else every(samples=40)
    result = run(tmp_path, model, engine, loss=counter, growth=growth, stages=stages)
    ledger = result.progress.ledger
    dropped = [line for line in lines(tmp_path, "skip") if line["late"]]
    assert ledger.applied == 150
    assert ledger.discarded > 0
    assert dropped
    assert ledger.total == counter.rows == result.progress.samples
    log = Log(tmp_path / "metrics.jsonl")
    log.advance()
    assert (log.ledger().applied, log.ledger().discarded) == (ledger.applied, ledger.discarded)


def test_what_is_dropped_at_the_end_is_made_up_for_before_the_run_is_over(tmp_path: Path) -> None:
    """The last job but two waits until the budget is handed out; drained, it is 4 updates old."""
    counter, model = Counter(), line()
    engine = scripted(hold_back(6, until=99), workers=3, drop_after=3)
    result = run(
        tmp_path, model, engine, loss=counter, growth=constant(4), stages=None, budget=budget(samples=48),
        run=RunSpec(dir=str(tmp_path), checkpoint=Checkpointing(every_steps=1, keep=99)),
    )  # fmt: skip
    assert result.finished
    assert result.progress.ledger.applied == 48
    assert result.progress.ledger.total == counter.rows == 48 + result.progress.ledger.discarded


@pytest.mark.parametrize("deaths", [(0,), (4, 5), (2, 3, 4, 9)])
def test_a_batch_whose_worker_dies_is_computed_by_another_and_counted_twice(
    deaths: tuple[int, ...], tmp_path: Path
) -> None:
    found: list[list[Tensor]] = []
    counter = Counter()
    for name, engine in (("torch", Torch(precision="float64")), ("async", scripted(dying(*deaths), workers=2))):
        model = line()
        result = run(tmp_path / name, model, engine, loss=counter if name == "async" else linear, optimizer=SGD())
        found.append(values(model))
    assert close(*found)
    ledger = result.progress.ledger
    assert ledger.applied == 150
    assert ledger.total == counter.rows
    assert ledger.discarded == counter.rows - 150 >= 4 * len(deaths)


def test_a_batch_that_kills_every_worker_ends_the_run(tmp_path: Path) -> None:
    def deadly(jobs: list[int]) -> int:
        return Death(jobs[0]) if jobs[0] >= 5 else jobs[0]

    with pytest.raises(TrainingFailed, match="4 workers.*same batch of"):
        run(tmp_path, line(), scripted(deadly, workers=1), loss=linear)


@pytest.mark.parametrize("workers", [1, 3])
def test_without_workers_a_run_ends_with_a_checkpoint_that_holds_every_batch_handed_out(
    workers: int, tmp_path: Path
) -> None:
    undisturbed, model, counter = line(), line(), Counter()
    run(tmp_path / "torch", undisturbed, Torch(precision="float64"), loss=linear, optimizer=SGD())
    with pytest.raises(TrainingFailed, match=r"no worker for 120 s.*engine.wait_s.*--resume|resume=True"):
        run(tmp_path / "run", model, scripted(workers=workers, lifetimes=8), loss=counter, optimizer=SGD())
    result = run(tmp_path / "run", model, scripted(workers=workers), loss=counter, optimizer=SGD(), resume=True)
    assert result.progress.ledger.applied == 150
    assert result.progress.ledger.total == counter.rows
    assert result.progress.ledger.replayed == 0
    assert close(values(undisturbed), values(model))


class Stops(Hook):
    """Requests a stop at an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_update(self, update: Any) -> None:
        if update.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("script", [in_turn, hold_back(9, until=12), dying(9, 11)])
def test_a_stopped_run_keeps_what_is_in_flight_and_goes_on_with_other_workers(script: Script, tmp_path: Path) -> None:
    undisturbed, model, counter = line(), line(), Counter()
    run(tmp_path / "torch", undisturbed, Torch(precision="float64"), loss=linear, optimizer=SGD())
    first = run(
        tmp_path / "run", model, scripted(script, workers=3, adaptive=False), loss=counter, optimizer=SGD(),
        hooks=[Stops(10)],
    )  # fmt: skip
    assert not first.finished
    newest = max((tmp_path / "run/checkpoints").iterdir())
    kept = torch.load(newest / "in_flight.pt", weights_only=True)
    assert len(kept["come"]) == 2
    last = run(tmp_path / "run", model, scripted(workers=2, adaptive=False), loss=counter, optimizer=SGD(), resume=True)
    ledger = last.progress.ledger
    assert (ledger.applied, ledger.replayed, last.progress.samples) == (150, 0, 150)
    assert ledger.total == counter.rows
    assert close(values(undisturbed), values(model))  # each batch once: the sum of all gradients is that of all rows
    assert not (max((tmp_path / "run/checkpoints").iterdir()) / "in_flight.pt").exists()


def test_gradients_that_are_not_finite_are_skipped_and_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    def broken(first: int, last: int) -> Any:
        made = iter(range(10**6))

        def poisoned(model: nn.Module, batch: Any) -> Tensor:
            bad = model.training and torch.is_grad_enabled() and first <= next(made) < last
            return linear(model, batch) * (float("nan") if bad else 1.0)

        return Counter(poisoned)

    counter = broken(20, 23)
    result = run(tmp_path / "some", line(), scripted(workers=2), loss=counter, growth=constant(4), stages=None)
    ledger = result.progress.ledger
    assert (ledger.applied, ledger.skipped) == (150, 12)
    assert ledger.total == counter.rows
    settings: Any = {"run": RunSpec(dir=str(tmp_path / "all"), max_skips=5)}
    with pytest.raises(Diverged, match="5 updates in a row"):
        run(tmp_path / "all", line(), scripted(workers=2), loss=broken(10, 10**6), **settings)


def test_items_and_tokens_are_those_of_plain_training(tmp_path: Path) -> None:
    """With one worker to the bit; with three every batch is still counted once."""

    def items(batch: Any) -> int:
        return int(batch[1].sum())

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        each = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (each * batch[1]).sum() / batch[1].sum()

    found: list[Any] = []
    for engine in (Torch(precision="float64"), scripted(workers=1), scripted(workers=3)):
        model = network()
        result = run(
            tmp_path / f"{len(found)}", model, engine, items=items, tokens=lambda batch: 3 * len(batch[0]),
            loss=weighted,
        )  # fmt: skip
        assert result.progress.tokens == 450
        found.append(values(model))
    assert same(found[0], found[1])


def test_withdrawn_updates_move_from_applied_to_where_they_belong() -> None:
    plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=1)
    lost = (Lost(batch=4, stage=0, tokens=40), Lost(batch=8, stage=1, tokens=80, finite=False))
    before = Progress(step=9, samples=60, stage=1, stage_samples=24, stage_step=3, skips=2, tokens=600)
    outcome = Outcome(applied=False, tokens=80, withdrawn=Withdrawn(lost=lost, wasted=5))
    after = before.after(plan, outcome)
    assert (after.step, after.samples, after.tokens, after.skips) == (8, 68, 560, 3)
    assert (after.stage_samples, after.stage_step) == (24, 3)  # one came, one of this stage went
    assert (after.ledger.applied, after.ledger.skipped, after.ledger.discarded) == (8 - 12, 8, 4 + 5)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["growth={kind: noise_scale, start: 16, cap: 64}"], r"growth.kind=noise_scale.*engine.kind=async.*linear"),
        (["growth={kind: progress_test, start: 16, cap: 64}"], r"growth.kind=progress_test.*engine.kind=async"),
        (["growth={kind: auto}"], r"growth.kind=auto.*engine.kind=async"),
        (["optimizer={kind: clars}"], r"optimizer.kind=clars.*engine.kind=async.*lars"),
        (["optimizer={kind: adamw, at_growth: {beta2: samples}}"], r"at_growth.*engine.kind=async"),
        (["engine.max_micro=auto"], r"max_micro=auto.*number"),
        (["engine.drop_after=1"], r"drop_after=1.*workers=2.*at least 2"),
        (["engine.resources={CPU: -1}"], r"resources=.*'CPU' cannot be -1.*0 or more"),
        (["engine.resources={memory: 9}"], r"resources=.*'memory' cannot be 9.*CPU, GPU"),
        (["engine.workers=0"], r"engine.workers=0"),
        (["engine.delay=2"], r"delay=2.*leave delay out"),
        (["run.noise.every=4"], r"run.noise.every=4.*engine.kind=async"),
        (["launch.workers=2"], r"engine.kind=async has one rank.*2.*engine.workers"),
        (["launch={kind: ray, workers: [1, 4]}"], r"engine.kind=async has one rank.*engine.workers"),
    ],
)  # fmt: skip
def test_what_asynchronous_workers_cannot_do_is_refused_with_the_way_out(overrides: list[str], keys: str) -> None:
    config: Any = {"growth": {"kind": "constant"}, "budget": {"epochs": 1}, "engine": {"kind": "async"}}
    parse(config)
    for override in overrides:
        config = apply(config, override)
    with pytest.raises(ConfigError, match=keys):
        parse(config)


def test_verify_refuses_asynchronous_workers() -> None:
    config = parse({"growth": {"kind": "constant"}, "budget": {"epochs": 1}, "engine": {"kind": "async"}})
    with pytest.raises(ConfigError, match=r"engine.kind=async.*engine.kind=torch"):
        verify(config)


def test_an_optimizer_that_goes_by_parts_is_refused_by_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clars"):
        run(tmp_path, line(), Async(), optimizer=CLARS())
    with pytest.raises(ConfigError, match="at_growth"):
        run(tmp_path, line(), Async(), optimizer=AdamW(at_growth=AtGrowth(moments="reset")))


def test_evaluations_use_as_many_experts_as_the_plan_of_the_last_batch() -> None:
    class Sparse(nn.Linear):
        active = 1

        def activate(self, experts: int) -> None:
            self.active = experts

    model = Sparse(3, 2).double()
    engine = scripted(workers=1).build(model, linear, metrics=None, optimizer=SGD(), world=World())
    plan = Plan(batch=2, world=1, micro=2, accum=1, lr=0.1, stage=0, active=3)
    engine.update(plan, [(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2))])
    assert model.active == 3
    engine.close()
