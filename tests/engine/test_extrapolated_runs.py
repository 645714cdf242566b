"""Runs whose gradients are evaluated at shifted points: what they count, measure and refuse."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from shifted import KINDS, close, engine_of, lines, lively, run, same, values
from tiny import data, loss, network
from torch import Tensor, nn

from distgrow import (
    CLARS,
    SGD,
    Extrapolate,
    RunSpec,
    Torch,
    adascale,
    budget,
    constant,
    noise_scale,
    norm_threshold,
    progress_test,
    tau_nice,
)
from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError
from distgrow.core.noise_stats import Measuring
from distgrow.core.plan import Plan
from distgrow.core.progress import Ledger, Progress
from distgrow.engine.extrapolated import ExtrapolatingEngine
from distgrow.planning.check import problems
from distgrow.report.log import Log
from distgrow.report.sections import ledger

# ── counts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_holds_every_row_that_went_backward(kind: str, tmp_path: Path) -> None:
    rows = 0

    def counting(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])

        def count(gradient: Tensor) -> None:
            nonlocal rows
            rows += len(gradient)

        if outputs.requires_grad:
            outputs.register_hook(count)
        return nn.functional.cross_entropy(outputs, batch[1])

    result = run(tmp_path, network(), loss=counting, extrapolate=Extrapolate(rate=0.1, **KINDS[kind]))
    ledger, twice = result.progress.ledger, kind.startswith("fresh")
    checked = 8 if rows > ledger.total else 0  # what the check of the loss evaluates, before the run
    assert rows - checked == ledger.total == (320 if twice else 160)
    assert (ledger.applied, ledger.extrapolated, result.progress.samples) == (160, 160 * twice, 160)
    told = [(line["sfo"], line.get("sfo_extrapolated")) for line in lines(tmp_path)]
    assert told[-1] == ((320, 160) if twice else (160, None))
    assert all((extra is not None) is twice for _, extra in told)


PARTS = [(torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.long))] * 2
BOTH = Plan(batch=8, world=1, micro=4, accum=2, lr=0.1, stage=0)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("number", [math.nan, 1e300])
@pytest.mark.parametrize(("bad", "extra"), [(1, 0), (2, 8), (3, 8)])
def test_a_pass_that_is_not_finite_is_skipped_and_charged_as_far_as_it_went(
    bad: int, extra: int, number: float, clip: float | None
) -> None:
    """Micro-batches 0 and 1 are the first pass: if it is bad, there is no second. 1e300 overflows in the norm alone."""
    calls, model = itertools.count(), lively()

    def poisoned(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) * (number if next(calls) == bad else 1.0)

    engine, before = engine_of(model, poisoned, Extrapolate(kind="fresh", rate=0.1), SGD(clip=clip)), values(model)
    outcome = engine.update(BOTH, PARTS, (True, False))
    assert (outcome.applied, outcome.extrapolated, outcome.votes) == (False, extra, (True, False))
    assert engine.evaluations == 8 + extra
    assert same(values(model), before)
    spent = Progress().after(BOTH, outcome).ledger
    assert (spent.skipped, spent.extrapolated, spent.total) == (8, extra, 8 + extra)
    assert engine.update(BOTH, PARTS).applied


@pytest.mark.parametrize(
    ("kind", "bad", "evaluated"), [("fresh", 0, 8), ("fresh", 3, 16), ("fresh in groups", 1, 16), ("past", 1, 8)]
)
def test_a_pass_that_memory_did_not_hold_is_discarded_as_far_as_it_went(kind: str, bad: int, evaluated: int) -> None:
    calls, model = itertools.count(), lively()

    def tight(model: nn.Module, batch: Any) -> Tensor:
        if next(calls) == bad:
            raise MemoryError("once")
        return loss(model, batch)

    engine, before = engine_of(model, tight, Extrapolate(rate=0.1, **KINDS[kind])), values(model)
    outcome = engine.update(BOTH, PARTS)
    assert outcome.out_of_memory
    assert engine.evaluations == evaluated
    assert same(values(model), before)
    spent = Progress().after(BOTH, outcome).ledger
    assert (spent.discarded, spent.extrapolated) == (evaluated, 0)
    if "groups" in kind:
        with pytest.raises(ConfigError, match=r"extrapolate.group=4 .* micro-batches of up to 2"):
            engine.update(Plan(batch=8, world=1, micro=2, accum=4, lr=0.1, stage=0), PARTS)


def test_the_report_reads_and_shows_what_was_extrapolated_and_is_silent_about_it_otherwise(tmp_path: Path) -> None:
    run(tmp_path / "fresh", network(), extrapolate=Extrapolate(kind="fresh", rate=0.1))
    run(tmp_path / "plain", network())
    fresh, plain = (Log(tmp_path / name / "metrics.jsonl") for name in ("fresh", "plain"))
    assert fresh.advance()
    assert plain.advance()
    assert fresh.ledger() == Ledger(applied=160, extrapolated=160)
    assert [(part["name"], part["count"]) for part in ledger(fresh.ledger())["spent"]] == [
        ("applied", "160"), ("extrapolated", "160")
    ]  # fmt: skip
    assert [part["name"] for part in ledger(plain.ledger())["spent"]] == ["applied"]
    assert "extrapolated" not in ledger(plain.ledger())["unspent"]


def test_trials_of_memory_extrapolate_nothing(tmp_path: Path) -> None:
    for kind in ("past", "fresh"):
        engine = Torch(precision="float64", max_micro="auto")
        result = run(tmp_path / kind, network(), engine=engine, extrapolate=Extrapolate(kind=kind, rate=0.1))
        assert result.progress.ledger.probe > 0
        assert result.progress.ledger.extrapolated == (160 if kind == "fresh" else 0)


def test_old_progress_files_have_no_extrapolated_evaluations_and_new_ones_only_if_there_are_any() -> None:
    plain = Progress(ledger=Ledger(applied=5)).to_dict()
    assert "extrapolated" not in plain["ledger"]
    assert Progress.from_dict(plain).ledger.extrapolated == 0
    spent = Progress(ledger=Ledger(applied=5, extrapolated=3, discarded=2))
    assert Progress.from_dict(spent.to_dict()) == spent
    assert (spent.ledger.total, spent.ledger.first_time) == (10, 8)


# ── noise, items ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_noise_is_measured_where_one_shift_holds_for_the_whole_batch_and_is_then_that_of_the_plain_run(
    tmp_path: Path,
) -> None:
    """Gradients that do not depend on the parameters are the same at any point."""

    def linear(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).mean()

    def scales(name: str, extrapolate: Extrapolate | None) -> list[Any]:
        model = nn.Linear(3, 2).double()
        run(tmp_path / name, model, loss=linear, growth=constant(16), stages=None, extrapolate=extrapolate)
        return [(line["noise_trace"], line["grad_sq"]) for line in lines(tmp_path / name)]

    plain = scales("plain", None)
    assert all(trace is not None for trace, _ in plain)
    for name, kind in KINDS.items():
        found = scales(name, Extrapolate(rate=0.5, **kind))
        assert found == (plain if name in ("past", "noise") else [(None, None)] * len(plain))


def test_a_mean_over_items_is_shifted_by_the_mean_over_items(tmp_path: Path) -> None:
    """Rows of label 0 are no items: the run is one whose batches lack them."""

    def positive(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1].masked_fill(batch[1] == 0, -100))

    found = list[list[Tensor]]()
    rows = [(torch.stack([r for r, _ in data(96)[k : k + 8]]), torch.tensor([0, 1, 1, 1] * 2)) for k in range(0, 96, 8)]
    for kind in ("past", "fresh"):
        for micro in (2, 8):
            model = network()
            settings: dict[str, Any] = {"spec": Torch(precision="float64"), "optimizer": SGD(clip=0.2)}
            items = (lambda batch: (batch[1] > 0).sum()) if micro == 2 else None
            engine = ExtrapolatingEngine(
                model, positive, items=items, extrapolate=Extrapolate(kind=kind, rate=0.5), **settings
            )
            for inputs, labels in rows:
                plan = Plan(batch=8, world=1, micro=micro, accum=8 // micro, lr=0.3, stage=0)
                engine.update(plan, list(zip(inputs.split(micro), labels.split(micro), strict=True)))
            found.append(values(model))
    assert close(found[0], found[1])
    assert close(found[2], found[3])
    assert not close(found[0], found[2])


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────

PAST, FRESH = Extrapolate(kind="past", rate=0.1), Extrapolate(kind="fresh", rate=0.1)
GROUPS = Extrapolate(kind="noise", rate=0.1, local=True, group=4)
OWN = Extrapolate(kind="past", rate=0.1, local=True)
NICE: dict[str, Any] = {"samples": 64, "smoothness": 1.0, "largest_smoothness": 2.0, "mu": 0.1, "optimum_sq": 1.0}


@pytest.mark.parametrize(
    ("extrapolate", "settings", "keys"),
    [
        (PAST, {"engine": Torch(delay=1)}, r"extrapolate.kind=past and engine.delay=1.*engine.delay=0"),
        (PAST, {"growth": progress_test(start=4, cap=8), "stages": None}, r"growth.kind=progress_test.*critical_batch"),
        (PAST, {"growth": tau_nice(**NICE, epsilon=0.1), "stages": None}, r"growth.kind=tau_nice .*noise_scale"),
        (FRESH, {"growth": noise_scale(start=4, cap=8), "stages": None}, r"growth.kind=noise_scale.*fresh.*kind past"),
        (FRESH, {"growth": adascale(start=4, scale=2), "stages": None}, r"growth.kind=adascale.*fresh"),
        (OWN, {"growth": noise_scale(start=4, cap=8), "stages": None}, r"noise_scale.*past with local=true"),
        (GROUPS, {"optimizer": CLARS()}, r"optimizer.kind=clars.*local=true"),
        (FRESH, {"run": RunSpec(noise=Measuring(every=1))}, r"run.noise.every=1.*fresh"),
        (GROUPS, {"run": RunSpec(noise=Measuring(by_parameter=True))}, r"run.noise.by_parameter=true.*local=true"),
        (FRESH, {"budget": budget(sfo=100)}, r"budget.sfo=100.*fresh.*budget.samples"),
        (GROUPS, {"engine": Torch(max_micro=2)}, r"extrapolate.group=4.*engine.max_micro=2.*engine.max_micro=4"),
        (GROUPS, {"engine": Torch(max_micro="auto")}, r"extrapolate.group=4.*engine.max_micro=auto"),
        (GROUPS, {"growth": norm_threshold(start=4), "stages": None}, r"extrapolate.group=4.*norm_threshold"),
        (GROUPS, {"budget": budget(samples=162)}, r"batch=18 .*1 rank .*extrapolate.group=4"),
        (GROUPS, {"growth": constant(6), "stages": None}, r"batch=6 of stage 0.*extrapolate.group=4"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_by_name(
    extrapolate: Extrapolate, settings: dict[str, Any], keys: str, tmp_path: Path
) -> None:
    given: Any = settings.pop("run", RunSpec())
    with pytest.raises(ConfigError, match=keys):
        run(
            tmp_path,
            network(),
            extrapolate=extrapolate,
            run=given.model_copy(update={"dir": str(tmp_path)}),
            **settings,
        )


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("extrapolate={kind: past, rate: -1}", r"extrapolate.rate=-1"),
        ("extrapolate={kind: past}", r"extrapolate.rate"),
        ("extrapolate={kind: future, rate: 1}", r"extrapolate.kind=.?future"),
        ("extrapolate={kind: noise, rate: 0.1, local: true}", r"extrapolate.*local=true needs group"),
        ("extrapolate={kind: noise, rate: 0.1, group: 8}", r"extrapolate.*group=8.*local=true"),
        (
            "extrapolate={kind: past, rate: 0.1, local: true, group: 8}",
            r"extrapolate.*group=8.*leave it out.*noise or fresh",
        ),
    ],
)
def test_bad_keys_are_refused(override: str, keys: str) -> None:
    base = {"growth": {"kind": "constant"}, "budget": {"epochs": 1}}
    with pytest.raises(ConfigError, match=keys):
        parse(apply(base, override))


@pytest.mark.parametrize("kind", ["deepspeed", "async"])
def test_other_engines_are_refused_with_the_way_out(kind: str) -> None:
    base = {"growth": {"kind": "constant"}, "budget": {"epochs": 1}, "engine": {"kind": kind}}
    with pytest.raises(ConfigError, match=rf"extrapolate.kind=noise.*engine.kind={kind}.*engine.kind=torch"):
        parse(apply(base, "extrapolate={kind: noise, rate: 0.1}"))


def test_a_resumed_run_needs_the_same_extrapolation(tmp_path: Path) -> None:
    run(tmp_path, network(), extrapolate=PAST)
    with pytest.raises(ConfigError, match=r"extrapolate.rate: 0.1 in the folder, 0.2 now"):
        run(tmp_path, network(), extrapolate=Extrapolate(kind="past", rate=0.2), resume=True)
    with pytest.raises(ConfigError, match=r"extrapolate"):
        run(tmp_path, network(), resume=True)


def test_extrapolate_is_one_of_these_in_fit(tmp_path: Path) -> None:
    given: Any = "past"
    with pytest.raises(ConfigError, match=r"extrapolate='past'.*Extrapolate\(kind='past'"):
        run(tmp_path, network(), extrapolate=given)


@pytest.mark.parametrize(
    ("extrapolate", "lr", "stable"),
    [
        ("{kind: past, rate: 0.05}", 0.099, True), ("{kind: past, rate: 0.05}", 0.101, False),
        ("{kind: fresh, rate: 0.05}", 0.399, True), ("{kind: fresh, rate: 0.05}", 0.401, False),
        ("{kind: fresh, rate: 0.1}", 0.001, False), ("{kind: noise, rate: 0.1}", 0.5, True),
    ],
)  # fmt: skip
def test_a_plan_refuses_a_learning_rate_that_shifts_make_unstable(extrapolate: str, lr: float, stable: bool) -> None:
    """L = 10: 2/10 − 2γ̂, and 2/(10(1 − ½)) at γ̂L = ½, 0 at γ̂L = 1. Of noise no limit is known."""
    constants = {"smoothness": 10.0, "variance": 1.0, "gap": 1.0, "epsilon": 0.1}
    base = {"growth": {"kind": "constant", "start": 16}, "budget": {"epochs": 1}, "lr": {"base": lr}}
    config = parse(apply({**base, "theory": constants}, f"extrapolate={extrapolate}"))
    assert config.applicable_theory() is None
    found = problems(config, config.controller(1))
    assert (not found) is stable
    assert stable or ("extrapolate.kind" in found[0] and f"lr={lr:g}" in found[0])
