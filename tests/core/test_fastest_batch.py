"""The batch at which time to the same loss is least: by brute force, by single updates, and in `plan`."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Script

from distgrow.config.load import parse
from distgrow.core.pace import Pace
from distgrow.planning.cost import fastest, measured_scale, stretches
from distgrow.planning.cost_table import constant_batches
from distgrow.planning.table import show
from distgrow.theory.noise import expected_decrease, fastest_batch, half_batch, steps_overhead, time_to_progress

latencies, rates, scales = st.floats(1e-4, 10), st.floats(1, 1e5), st.floats(1, 1e5)


@given(latencies, rates, scales)
def test_no_other_batch_is_faster(latency: float, rate: float, scale: float) -> None:
    best = fastest_batch(latency, rate, scale)
    least = time_to_progress(best, latency, rate, scale)
    others = best * np.geomspace(1e-3, 1e3, 301)
    assert min(time_to_progress(float(b), latency, rate, scale) for b in others) >= least * (1 - 1e-9)
    assert least == pytest.approx((math.sqrt(latency) + math.sqrt(scale / rate)) ** 2)
    assert best == pytest.approx(math.sqrt(half_batch(latency, rate) * scale))


@given(latencies, rates)
def test_at_half_batch_an_update_takes_twice_its_fixed_part(latency: float, rate: float) -> None:
    half = half_batch(latency, rate)
    assert latency + half / rate == pytest.approx(2 * latency)
    assert half_batch(0.0, rate) == 0


@given(st.floats(1.5, 64), latencies, rates, scales)
def test_more_workers_or_more_noise_make_the_fastest_batch_grow_by_the_root(
    factor: float, latency: float, rate: float, scale: float
) -> None:
    one = fastest_batch(latency, rate, scale)
    assert fastest_batch(latency, factor * rate, scale) == pytest.approx(math.sqrt(factor) * one)
    assert fastest_batch(latency, rate, factor * scale) == pytest.approx(math.sqrt(factor) * one)


@given(st.floats(0.1, 10), st.floats(0.1, 100), st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 5000))
def test_the_best_update_of_a_batch_makes_the_progress_that_is_assumed(
    grad_sq: float, variance: float, curvature: float, noise_curvature: float, batch: int
) -> None:
    """With the best η for the batch, by trying; B is then tr(HΣ)/GᵀHG."""

    def best(size: float) -> float:
        fixed = curvature * grad_sq + noise_curvature * variance / size
        around = grad_sq / fixed * np.linspace(0.5, 1.5, 101)
        return max(expected_decrease(grad_sq, variance, float(lr), size, curvature, noise_curvature) for lr in around)

    scale = noise_curvature * variance / (curvature * grad_sq)
    assert best(1e15) / best(float(batch)) == pytest.approx(steps_overhead(batch, scale), rel=1e-6)


@pytest.mark.parametrize(
    ("latency", "rate", "scale"), [(-1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (math.nan, 1.0, 1.0)]
)
def test_what_is_no_pace_is_refused(latency: float, rate: float, scale: float) -> None:
    with pytest.raises(ValueError, match=r"latency|rate|scale"):
        fastest_batch(latency, rate, scale)


# ── in the plan ─────────────────────────────────────────────────────────────────────────────────────────────────

CONFIG = {
    "growth": {"kind": "exponential", "start": 8, "cap": 64},
    "stages": {"every": {"epochs": 2}},
    "launch": {"workers": [1, 2], "pace": {"samples_per_s": 500, "latency_s": 0.08}},
    "engine": {"max_micro": 16},
    "budget": {"epochs": 10},
}


def test_the_plan_shows_both_batches_of_each_number_of_workers() -> None:
    controller, pace = parse(CONFIG).controller(), Pace(samples_per_s=500, latency_s=0.08)
    halves, one, two = fastest(controller, pace, 160.0)
    assert halves == "half of an update is latency at a batch of 40 on 1, 80 on 2 workers"
    assert "on 1 worker is fastest at a batch of 80;" in one  # √(40 · 160)
    assert "on 2 workers is fastest at a batch of 113;" in two
    for world, line in ((1, one), (2, two)):
        spent = made = 0.0
        for stretch in stretches(controller):  # update by update
            for _ in range(stretch.updates if stretch.world == world else 0):
                spent += 0.08 + math.ceil(stretch.batch / world) / 500
                made += 1 / (1 + 160 / stretch.batch)
        best = (math.sqrt(0.08) + math.sqrt(160 / (500 * world))) ** 2
        assert f"take {spent / made / best:.2f} × as long" in line
        assert spent / made / best >= 1


def test_the_plan_shows_what_its_progress_costs_at_constant_batches_and_the_fastest_is_least() -> None:
    controller, pace = parse(CONFIG).controller(), Pace(samples_per_s=500, latency_s=0.08)
    head, names, *lines, _ = constant_batches(controller, pace, 160.0)
    assert "on 2 workers" in head
    assert names.split() == ["batch", "seconds", "worker-seconds", "updates", "evaluations"]
    made = sum(1 / (1 + 160 / part.batch) for part in stretches(controller) for _ in range(part.updates))
    rows = [[float(word.replace(",", "")) for word in re.findall(r"[\d.,]*\d", line)] for line in lines]
    assert [row[0] for row in rows] == [28, 56, 114, 226, 452]  # 113.1·2^k, as multiples of 2
    for batch, seconds, held, updates, evaluations in rows:
        assert updates == pytest.approx(made * (1 + 160 / batch), abs=0.51)
        assert evaluations == pytest.approx(made * (batch + 160), abs=0.51)  # E = E_min·(1 + b/B)
        assert seconds == pytest.approx(made * (1 + 160 / batch) * (0.08 + batch / 1000), abs=0.051)
        assert held == pytest.approx(2 * seconds, abs=0.11)
    assert min(rows, key=lambda row: row[1])[0] == 114


def test_without_a_noise_scale_or_a_fixed_part_less_is_said() -> None:
    controller = parse(CONFIG).controller()
    assert constant_batches(controller, Pace(samples_per_s=500, latency_s=0.08), None) == []
    (line,) = fastest(controller, Pace(samples_per_s=500, latency_s=0.08), None)
    assert "fastest" not in line
    assert fastest(controller, Pace(samples_per_s=500), 160.0) == []


def test_the_noise_scale_comes_from_the_run_or_from_the_constants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script().event("start").stage(0, 8, 8).updates(*[1.0] * 20)
    for k, event in enumerate(event for event in script.events if event["event"] == "step"):
        event["noise_scale"] = 10.0 if k < 9 else None if k % 3 else float(100 + k)
    found = measured_scale(script.save(tmp_path / "run"))
    assert found == 113.5  # of 109, 112, 115 and 118
    assert measured_scale(Script().event("start").stage(0, 8, 8).updates(1.0).save(tmp_path / "none")) is None
    theory = {"smoothness": 1.0, "variance": 40.0, "gap": 1.0, "epsilon": 0.5}
    run = parse({**CONFIG, "lr": {"base": 0.01}, "theory": theory})
    assert run.theory is not None
    assert run.theory.noise_scale == 160
    show(run, None, 10, run.launch.pace, run.theory.noise_scale)
    assert "at a noise scale of 160, progress on 1 worker is fastest at a batch of 80" in capsys.readouterr().out
