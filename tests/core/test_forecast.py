"""The plan that a report shows is what `distgrow plan` shows of the same config, and what a run of it comes to."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import EPOCH, Script

from distgrow import Controller, Outcome, Progress, budget, every, exponential
from distgrow.config.load import parse
from distgrow.planning import table
from distgrow.planning.forecast import foresee
from distgrow.report.planned import Planned, reached
from distgrow.report.runs import Record, read

SCHEDULE = "growth: {kind: exponential, start: 8, cap: 32}\nstages: {every: {samples: 100}}\nlr: {base: 0.1}\n"
THEORY = "theory: {smoothness: 2.0, variance: 3.0, gap: 2.0, epsilon: 0.6}\n"


def record(folder: Path, config: str) -> Record:
    """A run of 100 samples an epoch with a config."""
    return read([Script().stage(0, 8, 8).updates(1.0).save(folder / "run", config=config)])[0]


def planned(folder: Path, config: str) -> Planned:
    """What foresee tells."""
    found = foresee(record(folder, config))
    assert found is not None
    return found


@pytest.mark.parametrize("unit", [{"epochs": 5.5}, {"steps": 30}, {"samples": 333}])
def test_the_plan_is_what_taking_the_run_update_by_update_gives(tmp_path: Path, unit: dict[str, Any]) -> None:
    found = planned(tmp_path, f"{SCHEDULE}budget: {json.dumps(unit)}\n")
    control = Controller(
        growth=exponential(start=8, factor=2, cap=32), stages=every(samples=100), budget=budget(**unit), epoch=EPOCH
    )
    progress, ends, largest = Progress(), dict[int, int](), 0
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        progress = progress.after(plan, Outcome())
        ends[plan.stage], largest = progress.ledger.applied, max(largest, plan.batch)
    (course,) = found.forecasts
    assert (course.sfo, course.updates, course.last) == (progress.ledger.applied, progress.step, max(ends))
    assert found.after == ends
    assert course.batch == largest
    assert found.target is None


def test_growth_that_measures_has_the_courses_of_its_bounds_and_promises_no_stage(tmp_path: Path) -> None:
    config = "growth: {kind: gns, start: 8, cap: 64, dwell: {samples: 200}}\nstages: {}\nlr: {base: 0.1}\n"
    found = planned(tmp_path, f"{config}budget: {{samples: 2000}}\n")
    slowest, fastest = found.forecasts
    assert (slowest.last, slowest.batch, slowest.updates) == (0, 8, 250)
    assert fastest.updates < slowest.updates
    assert fastest.batch > slowest.batch
    assert slowest.sfo == fastest.sfo == 2000
    assert found.after == {}


def test_the_predicted_sfo_is_what_plan_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, f"{SCHEDULE}budget: {{samples: 5000}}\n{THEORY}").target
    assert found is not None
    values = {"growth": {"kind": "exponential", "start": 8, "cap": 32}, "stages": {"every": {"samples": 100}}}
    theory = {"smoothness": 2.0, "variance": 3.0, "gap": 2.0, "epsilon": 0.6}
    table.show(parse({**values, "lr": {"base": 0.1}, "budget": {"samples": 5000}, "theory": theory}), 1, rows=20)
    out = capsys.readouterr().out
    (sfo,) = found.sfo
    assert sfo is not None
    assert f"predicted SFO to ‖∇f‖ ≤ 0.6: {sfo:,} ({sfo / found.best_sfo:.2f} × the best constant)" in out
    assert f"b* = {found.best_batch:,.1f}, {found.best_sfo:,.0f} gradient evaluations" in out
    assert f"{found.best_sfo / found.best_batch:,.0f} updates" in out


@pytest.mark.parametrize(
    "config", ["run: {seed: 0}\n", "", "- 1\n", "growth: [", f"{SCHEDULE}budget: {{years: 2}}\n", "growth: {kind: new}"]
)
def test_a_config_that_tells_no_schedule_promises_nothing(tmp_path: Path, config: str) -> None:
    assert foresee(record(tmp_path, config)) is None


def test_the_target_counts_as_reached_at_the_first_probe_below_it_without_what_probes_took(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(1.0).event("probe", norm=0.7, sfo=108, sfo_probe=100).updates(1.0)
    script.event("probe", norm=0.5, sfo=216, sfo_probe=200).event("probe", norm=None).event("probe", norm=0.1)
    found = read([script.save(tmp_path / "run")])[0]
    assert reached(found, 0.6) == 16
    assert reached(found, 0.7) == 8
    assert reached(found, 0.01) is None
