"""Crossings, quartiles, choices and storage of the SFO benchmark, against brute force."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scale_cluster import WORKERS, Cluster
from scale_objective import AIMED, at_scale, suits
from scale_time import seconds_to
from sfo_plots import pareto_front
from sfo_problems import digits, quadratic
from sfo_readme import marked, replaced
from sfo_results import (
    Course,
    Minima,
    Reading,
    Result,
    Setting,
    Store,
    best_setting,
    finalists,
    key_of,
    quartiles,
    result_of,
)

TARGETS = (0.5, 0.1)
norms = st.lists(st.floats(0.01, 2.0), min_size=1, max_size=60)


def finished(values: list[float], *, batch: int = 4, **facts: Any) -> Result:
    """A run of updates of `batch` samples, looked at after each."""
    course = Course(grad_norm=Minima(targets=TARGETS), held_loss=Minima(targets=TARGETS))
    for step, value in enumerate(values, start=1):
        course.updated(batch)
        course.read(step * batch, Reading(grad_norm=value, loss=value + 1))
    own = {"problem": "p", "policy": "a", "setting": "s", "seed": 0, "key": key_of(values, facts), "config": {}}
    return result_of(course, hardware="", **{**own, "epoch": 100, "ending": "done", **facts})


@given(norms)
def test_a_crossing_is_the_first_value_at_most_the_target(values: list[float]) -> None:
    run = finished(values)
    for target in TARGETS:
        step = next((i for i, value in enumerate(values, start=1) if value <= target), math.inf)
        assert run.crossing("grad_norm", target) == (4 * step, step)


@given(norms, st.floats(0.01, 2.0))
def test_between_the_targets_a_crossing_is_at_most_two_percent_late(values: list[float], target: float) -> None:
    step = finished(values).crossing("grad_norm", target)[1]
    assert step >= next((i for i, value in enumerate(values, start=1) if value <= target), math.inf)
    assert step <= next((i for i, value in enumerate(values, start=1) if value <= 0.98 * target), math.inf)


@given(norms)
def test_best_and_last_are_over_all_readings(values: list[float]) -> None:
    run = finished(values)
    assert run.best["grad_norm"] == min(values) and run.last["grad_norm"] == values[-1]
    assert run.best["loss"] == min(values) + 1 and run.last["held_loss"] is None


@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=30), st.integers(0, 30))
def test_stretches_are_the_batches_up_to_a_step(batches: list[int], step: int) -> None:
    course = Course()
    for batch in batches:
        course.updated(batch)
    course.read(sum(batches), Reading(grad_norm=1.0, loss=1.0))
    facts = {"problem": "", "policy": "", "setting": "", "seed": 0, "key": "", "config": {}, "epoch": 1, "ending": ""}
    found = result_of(course, hardware="", **facts).stretches_to(step)
    assert [batch for batch, updates in found for _ in range(updates)] == batches[:step]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
def test_quartiles_of_numbers_are_numpys(values: list[float]) -> None:
    found = quartiles(values)
    assert np.allclose((found.low, found.median, found.high), np.quantile(values, (0.25, 0.5, 0.75)), atol=1e-6)


@given(st.lists(st.one_of(st.just(math.inf), st.floats(0, 1e6)), min_size=1, max_size=12))
def test_a_run_that_never_arrives_is_later_than_all_others(values: list[float]) -> None:
    late = quartiles(1e12 if math.isinf(value) else value for value in values)
    found = quartiles(values)
    for name in ("low", "median", "high"):
        value, stand_in = getattr(found, name), getattr(late, name)
        assert not math.isnan(value)
        assert (value == math.inf) == (stand_in > 1e6 + 1) or value == pytest.approx(stand_in)


def settings_of(crossings: dict[str, list[int]]) -> list[Setting]:
    """Settings whose runs, one a seed, come to 0.1 after so many updates."""
    return [
        Setting(policy="a", name=name, runs=[finished([1.0] * (step - 1) + [0.1], batch=batch) for step in steps])
        for batch, (name, steps) in enumerate(crossings.items(), start=1)
    ]


def test_the_best_setting_has_the_least_median_of_those_with_most_seeds() -> None:
    among = settings_of({"slow": [90, 100, 110], "fast": [30, 40, 99], "lucky": [2]})
    chosen = best_setting(among, "grad_norm", 0.1)
    assert chosen is not None and chosen.name == "fast"
    assert best_setting(among, "grad_norm", 0.01) is None


def test_finalists_are_the_cheapest_and_the_shortest() -> None:
    among = settings_of({"cheap": [50], "middle": [40], "short": [20], "long": [80]})
    assert {setting.name for setting in finalists(among, "grad_norm", [0.1, 0.001])} == {"cheap", "short"}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_the_front_holds_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    def beaten(p: tuple[int, int]) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    assert pareto_front(points) == sorted({point for point in points if not beaten(point)})


# ── storage ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_stored_is_read_back_and_never_twice(tmp_path: Path) -> None:
    store, run = Store(tmp_path / "deep/results.jsonl"), finished([1.0, 0.3, 0.2])
    assert run.key not in store
    store.add(run)
    again = Store(store.path)
    assert run.key in again and again.results == [run] and "other" not in again


def test_a_torn_line_is_dropped_and_the_lines_before_it_stay(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    runs = [finished([1.0, value]) for value in (0.3, 0.2, 0.15)]
    for run in runs[:2]:
        store.add(run)
    whole = store.path.read_text()
    store.path.write_text(whole[:-20])
    torn = Store(store.path)
    assert torn.results == runs[:1]
    torn.add(runs[2])
    assert [json.loads(line)["key"] for line in store.path.read_text().splitlines()] == [runs[0].key, runs[2].key]


@given(st.text(st.characters(exclude_characters="\r")), st.text(), st.text(), st.text(alphabet="ab|\n"))
def test_a_section_is_replaced_and_the_rest_left_alone(before: str, first: str, second: str, after: str) -> None:
    begin, end = marked("sfo-x")
    text = before + replaced("", "sfo-x", first).strip("\n") + after
    if begin in before or end in before:
        return
    changed = replaced(text, "sfo-x", second)
    assert changed.startswith(before) and changed.endswith(end + after)
    assert replaced(changed, "sfo-x", second) == changed


def test_a_new_section_goes_to_the_end(tmp_path: Path) -> None:
    text = replaced("# Title\n\nwords\n", "sfo-x", "table")
    assert text.startswith("# Title\n\nwords\n\n") and text.endswith(f"table\n{marked('sfo-x')[1]}\n")


# ── seconds at scale ────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.sampled_from([1, 8, 64]))
def test_seconds_are_the_sum_over_updates(batches: list[int], workers: int) -> None:
    cluster = Cluster(samples_per_s=10.0, latency_s=0.5, megabytes=100.0, gigabytes_per_s=1.0, hop_us=1000.0)

    def update(batch: int) -> float:
        busy = min(batch, workers)
        network = 0.0 if busy == 1 else 2 * math.log2(busy) * 1e-3 + 2 * (busy - 1) / busy * 0.1
        return 0.5 + network + math.ceil(batch / busy) / 10

    assert cluster.seconds([(batch, 3) for batch in batches], workers) == pytest.approx(3 * sum(map(update, batches)))


def test_only_updates_up_to_the_target_count() -> None:
    cluster = Cluster(samples_per_s=4.0, latency_s=1.0)
    run = finished([1.0, 0.4, 0.1, 0.05])
    assert seconds_to(run, cluster, 1, "grad_norm", 0.5) == pytest.approx(2 * 2.0)
    assert seconds_to(run, cluster, 1, "grad_norm", 0.001) == math.inf


@pytest.mark.parametrize(
    ("old", "kind", "today"),
    [
        ("adaptive", "adaptive", "norm_threshold"),
        ("tracking", "tracking", "critical_batch"),
        ("progress", "progress", "progress_test"),
        ("GNS", "gns", "noise_scale"),
        ("CABS", "cabs", "CABS"),
    ],
)
def test_a_run_stored_under_an_old_name_is_found_under_the_name_of_today(
    tmp_path: Path, old: str, kind: str, today: str
) -> None:
    problem = digits()
    contestant = next(c for c in problem.contestants() if c.policy == today)
    values = {**contestant.values, "growth": {**contestant.values["growth"], "kind": kind}}
    stored = finished([0.5], policy=old, setting=contestant.setting)
    line = {**asdict(stored), "key": key_of(problem.key, values, 0)}
    path = tmp_path / "digits.jsonl"
    path.write_text(json.dumps(line) + "\n")
    store = Store(path)
    assert problem.run_key(contestant, 0) in store
    assert [result.policy for result in problem.own(store.results)] == [today]


def test_an_objective_counts_for_the_workers_alone_that_it_was_decided_for() -> None:
    problem, cluster = at_scale(quadratic(), Cluster()), Cluster()
    aimed = [contestant for contestant in problem.contestants() if contestant.policy == AIMED]
    among = [
        Setting(policy=AIMED, name=each.setting, runs=[finished([1.0], policy=AIMED, config=each.values)])
        for each in aimed
    ]
    assert len({setting.name for setting in among}) == len(among)  # else runs of other workers would count as seeds
    for workers in WORKERS:
        fitting = [setting for setting in among if suits(setting, problem, cluster, workers)]
        wanted = min(workers, 1024 // 4)  # a row of the first batch each
        assert fitting
        assert {setting.runs[0].config["growth"]["objective"]["workers"] for setting in fitting} == {wanted}
    slower = Cluster(latency_s=0.4)
    assert not any(suits(setting, problem, slower, 8) for setting in among)
