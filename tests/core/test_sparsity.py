"""When the model is pruned: a pure function of the samples, whose compute is the budget's, whatever the batches."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest

from distgrow import Progress, Schedule, Sparsity, budget, constant, every, exponential, noise_scale, sparsity
from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError
from distgrow.core.noise_stats import Measured
from distgrow.core.progress import Outcome
from distgrow.growth.controller import Controller
from distgrow.growth.replan import replanned
from distgrow.planning.table import show
from distgrow.theory.pruning import density_at_samples, samples_per_compute

FAST = sparsity(0.8, every=0.2)


def walked(controller: Controller) -> list[tuple[int, int, float]]:
    """(first sample, batch, density) of each update of a run none of whose updates is skipped."""
    progress, updates = Progress(), list[tuple[int, int, float]]()
    while not controller.done(progress):
        progress = controller.advance(progress)
        plan = controller.plan(progress)
        updates.append((progress.ledger.applied, plan.batch, plan.density))
        progress = controller.after(progress, plan, Outcome(loss=1.0))
    assert progress.compute == pytest.approx(sum(batch * density for _, batch, density in updates))
    assert progress.density == updates[-1][2]
    return updates


@pytest.mark.parametrize("target", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_the_densities_of_all_samples_add_up_to_the_compute(target: float) -> None:
    spec, compute = sparsity(target), 20_000
    total = round(compute * samples_per_compute(target))
    assert sum(spec.density(k + 0.5, total) for k in range(total)) == pytest.approx(compute, rel=1e-4)
    assert spec.density(0, total) == 1.0
    assert spec.density(total, total) == 1 - target


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_every_pruning_takes_the_same_share_and_stays_by_the_smooth_density(share: float) -> None:
    spec, total = sparsity(0.7, every=share), 9_999
    found = [spec.density(k, total) for k in range(total + 1)]
    levels = sorted(set(found), reverse=True)
    assert found == sorted(found, reverse=True)
    assert len(levels) == spec.prunings + 1 == math.ceil(math.log(0.3) / math.log(1 - share)) + 1
    ratios = [after / before for before, after in zip(levels, levels[1:], strict=False)]
    assert ratios == pytest.approx([0.3 ** (1 / spec.prunings)] * spec.prunings)
    assert min(ratios) >= 1 - share - 1e-12
    for k, density in enumerate(found):
        assert abs(math.log(density / density_at_samples(k / total, 0.7))) <= -math.log(min(ratios)) / 2 + 1e-9


def test_growth_changes_nothing_of_the_shape() -> None:
    runs = [
        Schedule(growth=growth, stages=every(samples=900), budget=budget(samples=4_800), sparsity=FAST).controller(
            4_800
        )
        for growth in (constant(1), constant(16), exponential(2, 2, 32))
    ]
    for run in runs:
        for first, batch, density in walked(run):
            assert density == FAST.density(first + batch / 2, 4_800)


def test_a_budget_in_compute_is_one_in_samples() -> None:
    run = Schedule(growth=constant(4), budget=budget(compute=2_000), sparsity=FAST).controller(500)
    updates = walked(run)
    assert run.samples() == sum(batch for _, batch, _ in updates) == math.ceil(2_000 * samples_per_compute(0.8))
    assert sum(batch * density for _, batch, density in updates) == pytest.approx(2_000, rel=0.002)
    config = {"budget": {"compute": 2_000}, "sparsity": {"target": 0.8}, "growth": {"kind": "constant", "start": 4}}
    assert parse(config).controller(1).samples() == run.samples()
    dense = Schedule(growth=constant(4), budget=budget(compute=2_000)).controller(500)
    assert dense.samples() == 2_000


def test_a_dense_run_counts_every_sample_and_a_target_of_zero_is_a_dense_run() -> None:
    assert [Sparsity(target=0.0).density(k, 10) for k in range(11)] == [1.0] * 11
    assert Sparsity(target=0.0).prunings == 0
    progress = Progress()
    run = Schedule(growth=constant(4), budget=budget(samples=40)).controller(40)
    progress = run.after(progress, run.plan(progress), Outcome())
    assert (progress.compute, progress.spared, progress.density) == (4, 0.0, 1.0)


@pytest.mark.parametrize("start", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("target", [1e-9, 0.8, 0.999999])
def test_a_phase_as_short_as_floats_are_is_one_fall_to_the_target(target: float, start: float) -> None:
    spec = sparsity(target, start, math.nextafter(start, 1))
    densities = [spec.density(k, 10_000) for k in range(10_001)]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == 1 - target


def test_progress_comes_back_as_it_was_and_older_files_have_a_dense_model() -> None:
    run = Schedule(growth=constant(7), budget=budget(samples=700), sparsity=sparsity(0.9)).controller(70)
    progress = Progress()
    for _ in range(60):
        progress = run.after(progress, run.plan(progress), Outcome(loss=0.1))
    assert progress.spared > 0
    again = Progress.from_dict(json.loads(json.dumps(asdict(progress))))
    assert again == progress
    values: dict[str, Any] = asdict(progress)
    old = Progress.from_dict({key: value for key, value in values.items() if key not in ("density", "spared")})
    assert (old.density, old.compute) == (1.0, progress.ledger.applied)


def test_statistics_of_the_model_before_a_pruning_are_forgotten_as_at_a_new_stage() -> None:
    run = Schedule(growth=constant(4), budget=budget(samples=400), sparsity=FAST).controller(400)
    progress, fresh = Progress(), list[tuple[float, int, int]]()
    seen = Outcome(loss=1.0, measured=Measured(parts_sq=2.0, batch_sq=1.0, product=0.5))
    while not run.done(progress):
        plan = replace(run.plan(progress), window=8, accum=2, micro=2)
        progress = run.after(progress, plan, seen)
        fresh.append((plan.density, progress.noise.fresh, progress.noise.trend.count))
    for before, (density, count, points) in zip([(1.0, 0, 0), *fresh], fresh, strict=False):
        expected = 1 if density != before[0] else before[1] + 1
        assert (count, points) == (expected, expected)
    assert progress.noise.variance.weight > 4  # means that do not depend on the path go on


def test_a_density_never_rises_and_a_new_budget_that_would_raise_it_is_named() -> None:
    old, new = (
        Schedule(growth=constant(4), budget=budget(samples=samples), sparsity=FAST).controller(100)
        for samples in (400, 800)
    )
    at = Progress().repeat(4, 60)
    at = replace(at, density=old.plan(at).density)
    assert new.plan(replace(at, density=1.0)).density > new.plan(at).density == at.density
    assert any("the density of the model" in line for line in replanned(old, new, at))


def test_the_plan_shows_densities_and_compute(capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "budget": {"epochs": 20}, "sparsity": {"target": 0.8}, "growth": {"kind": "exponential", "start": 8, "cap": 64},
        "stages": {"every": {"epochs": 5}},
    }  # fmt: skip
    run = parse(config)
    assert show(run, 1, 40)
    shown = capsys.readouterr().out
    total = run.controller(1).samples()
    assert f"a compute of {total / samples_per_compute(0.8):,.0f} evaluations of the dense model" in shown
    assert "density" in shown
    assert "0.2" in shown
    assert show(parse({key: value for key, value in config.items() if key != "sparsity"}), 1, 40)
    assert "density" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{target: 1.0}", "sparsity.target"),
        ("{target: -0.1}", "sparsity.target"),
        ("{target: 0.5, start: 0.75, end: 0.25}", r"end=0.25 must be above start=0.75: raise end or lower start"),
        ("{target: 0.5, every: 0}", "sparsity.every"),
        ("{target: 0.5, every: 5.0e-324}", r"sparsity\.every=5\.0e-324: must be greater"),
        ("{target: 0.5, end: 1.5}", "sparsity.end"),
        ("{target: 0.5, keep_dense: ['(']}", r"keep_dense='\(' is no regular expression"),
        ("{start: 0.5}", "sparsity.target"),
    ],
)
def test_what_is_no_sparsity_is_refused_by_its_key(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(apply({"budget": {"epochs": 4}}, f"sparsity={given}"))


def test_an_adaptive_run_in_steps_does_not_know_its_samples() -> None:
    with pytest.raises(ConfigError, match=r"budget\.steps=40 leaves open.*growth\.kind=noise_scale.*or compute"):
        Schedule(growth=noise_scale(4), budget=budget(steps=40), sparsity=FAST).controller(100)
    Schedule(growth=noise_scale(4, cap=8), budget=budget(steps=40), sparsity=sparsity(0.0)).controller(100)
    Schedule(growth=exponential(4, 2, 8), budget=budget(steps=40), sparsity=FAST).controller(100)


@pytest.mark.parametrize(
    "engine", ["{kind: deepspeed, zero: 2}", "{kind: deepspeed, zero: 3}", "{kind: deepspeed, precision: bfloat16}"]
)
def test_an_engine_that_cannot_keep_weights_at_zero_is_refused(engine: str) -> None:
    config = apply(apply({"budget": {"epochs": 4}}, "sparsity={target: 0.5}"), f"engine={engine}")
    with pytest.raises(ConfigError, match=r"sparsity\.target=0\.5 .*zero=1"):
        parse(config)
