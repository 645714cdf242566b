"""The compute of runs with experts: weights against built models, counts against sums by hand, budgets in compute."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from distgrow.config.load import apply, parse
from distgrow.config.run import Run
from distgrow.core.active_experts import ActiveExperts
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.core.progress import Ledger, Lost, Outcome, Progress, Withdrawn
from distgrow.planning.table import show
from distgrow.report.log import Log
from distgrow.tasks.architectures import GPT, Tokens

BASE = {
    "task": {"kind": "raven", "features": 1, "rows": 200, "test": 10},
    "model": {"kind": "gpt", "layers": 2, "width": 8, "heads": 2, "experts": 4, "active": 2},
    "growth": {"kind": "exponential", "start": 8, "factor": 2, "cap": 32},
    "stages": {"every": {"samples": 80}},
    "budget": {"samples": 240},
    "lr": {"base": 0.01},
}


def config(*overrides: str) -> Run:
    return parse(reduce(apply, overrides, BASE))


def lines(folder: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == "step"]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("width", [8, 20, 64])
def test_weights_are_those_of_the_kernels_in_the_blocks_of_the_built_model(mlp: Any, width: int) -> None:
    spec = GPT(layers=3, width=width, heads=2, experts=5, active=2, mlp=mlp)
    model: Any = spec.build(Tokens(length=7, vocabulary=11))
    kernels = {name: p.numel() for name, p in model.blocks.named_parameters() if p.dim() == 2}
    total = sum(kernels.values())
    weights = spec.expert_weights()
    assert weights is not None
    for active in range(1, 6):
        idle = sum(size for name, size in kernels.items() if any(f".experts.{k}." in name for k in range(active, 5)))
        assert weights.share(active) == pytest.approx((total - idle) / total, rel=1e-15)
    assert weights.shared + 5 * weights.each == total
    assert GPT().expert_weights() is None


@pytest.mark.parametrize("active", [2, {"start": 1, "end": 4}, {"start": 4, "end": 2}])
def test_lines_have_the_sum_over_updates_of_batch_times_density(active: Any, tmp_path: Path) -> None:
    run = config(f"run.dir={tmp_path}", f"model.active={json.dumps(active)}")
    weights, compute = run.expert_weights(), 0.0
    assert weights is not None
    result = run.fit()
    for line in lines(tmp_path):
        number = active if isinstance(active, int) else line["active"]
        compute += line["batch"] * weights.share(number)
        assert line.get("density", 1.0) == weights.share(number)  # no key before anything is spared
        assert line.get("compute", line["sfo_applied"]) == pytest.approx(compute, rel=1e-12)
    assert result.progress.compute == pytest.approx(compute, rel=1e-12)
    assert result.progress.ledger.applied == 240
    assert Progress.from_dict(result.progress.to_dict()) == result.progress
    log = Log(tmp_path / "metrics.jsonl")
    assert log.advance()


def test_all_experts_and_none_have_no_compute_of_their_own(tmp_path: Path) -> None:
    for name, active in (("all", "model.active=4"), ("none", "model={kind: gpt, layers: 1, width: 8, heads: 2}")):
        config(f"run.dir={tmp_path / name}", active, "budget.samples=24").fit()
        assert all("compute" not in line and "density" not in line for line in lines(tmp_path / name))


@pytest.mark.parametrize("active", [1, 3, {"start": 1, "end": 4}])
def test_a_budget_in_compute_is_spent_to_within_a_batch(active: Any) -> None:
    run = config(f"model.active={json.dumps(active)}", "budget={compute: 150}")
    controller, progress = run.controller(1), Progress()
    while not controller.done(progress):
        progress = controller.advance(progress)
        progress = controller.after(progress, controller.plan(progress), Outcome())
    weights = run.expert_weights()
    assert weights is not None
    assert 150 <= progress.ledger.applied * weights.average * (1 + 1e-12) < 150 + weights.average
    granularity = 1 if isinstance(active, int) else 32  # the number is that of an update's first sample
    assert progress.compute == pytest.approx(150, abs=granularity)


def test_pruning_and_experts_multiply_and_a_budget_in_the_compute_of_both_is_refused_if_both_change() -> None:
    pruned = "sparsity={target: 0.5, every: 0.1}"
    run = config(pruned)
    weights, spared = run.expert_weights(), 0.0
    assert weights is not None
    controller, progress = run.controller(1), Progress()
    while not controller.done(progress):
        progress = controller.advance(progress)
        plan = controller.plan(progress)
        assert plan.share == weights.share(2)
        spared += plan.batch * (1 - plan.density * weights.share(2))
        progress = controller.after(progress, plan, Outcome())
    assert progress.spared == pytest.approx(spared, rel=1e-12)
    assert progress.density == pytest.approx(0.5)
    assert run.sparsity is not None
    average = run.sparsity.average_density * weights.share(2)
    assert config(pruned, "budget={compute: 100}").controller(1).samples() == -(-100 // average)
    with pytest.raises(ConfigError, match=r"budget.compute=100 .*model.active \(1 to 4\).*budget.samples"):
        config(pruned, "budget={compute: 100}", "model.active={start: 1, end: 4}").controller(1)


def test_updates_that_are_withdrawn_take_what_they_spared_with_them() -> None:
    plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0, share=0.75)
    one = Progress().after(plan, Outcome())
    lost = Withdrawn(lost=(Lost(batch=8, stage=0, spared=plan.spared),))
    two = one.after(plan, Outcome(withdrawn=lost))
    assert (one.spared, two.spared, two.compute) == (2.0, 2.0, 6.0)


def test_progress_of_earlier_versions_is_read() -> None:
    old = Progress(step=3, samples=24, ledger=Ledger(applied=24)).to_dict()
    del old["spared"]
    assert Progress.from_dict(old).compute == 24


def test_plan_shows_the_number_of_experts_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    run = config("model.active={start: 1, end: 3}")
    assert show(run, 1, rows=10)
    told = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines() if line.split() and line.split()[0] in ("0", "1", "2")]
    weights = run.expert_weights()
    assert weights is not None
    assert weights.active == ActiveExperts(start=1, end=3)
    assert [row[-2] for row in rows] == ["1", "2", "3"]
    assert [float(row[-1]) for row in rows] == pytest.approx([weights.share(k) for k in (1, 2, 3)], rel=1e-3)
    assert f"a compute of {weights.average * 240:,.0f} evaluations with all 4 experts" in told
