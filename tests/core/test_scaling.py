"""launch.workers in its three forms, and what every stage makes of it."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow import batches, budget, constant, every, exponential
from distgrow.config.load import load, parse
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Outcome, Progress
from distgrow.core.scaling import Group, ScalingPolicy, Workers, least, most, scaling_policy
from distgrow.growth.controller import Controller

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"


def run_of(*overrides: str) -> Run:
    return load(DIGITS, overrides)


ranges: st.SearchStrategy[Workers] = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(sorted)
by_stage: st.SearchStrategy[Workers] = st.dictionaries(st.integers(1, 6), st.integers(1, 8), max_size=4).flatmap(
    lambda workers: st.integers(1, 8).map(lambda first: {0: first, **workers})
)


@given(ranges, st.integers(0, 9), st.integers(1, 200), st.integers(1, 20))
def test_within_a_range_as_many_work_as_have_a_full_micro_batch(
    workers: list[int], stage: int, batch: int, max_micro: int
) -> None:
    full = [n for n in range(workers[0], workers[1] + 1) if n * max_micro <= batch]
    assert scaling_policy(workers)(stage, batch, max_micro) == max(full, default=workers[0])


@given(by_stage, st.integers(0, 9), st.integers(1, 200))
def test_by_stage_the_last_one_reached_counts(workers: dict[int, int], stage: int, batch: int) -> None:
    reached = stage
    while reached not in workers:
        reached -= 1
    assert scaling_policy(workers)(stage, batch, 8) == workers[reached]


@given(st.integers(1, 100), st.integers(0, 9), st.integers(1, 200), st.integers(1, 20))
def test_a_number_is_that_number_whatever_the_stage(workers: int, stage: int, batch: int, max_micro: int) -> None:
    assert scaling_policy(workers)(stage, batch, max_micro) == workers


def controller(workers: ScalingPolicy, asked: int, world: int, sizes: list[int], max_micro: int) -> Controller:
    return Controller(
        growth=batches(sizes), stages=every(samples=100), budget=budget(samples=450), epoch=1000, world=world,
        group=Group(scaling_policy=workers, asked=asked), max_micro=max_micro,
    )  # fmt: skip


def taken_by_groups(
    workers: ScalingPolicy, sizes: list[int], max_micro: int
) -> list[tuple[int, list[tuple[int, int]]]]:
    """A run in the groups that it asks for: each group's ranks, and the (stage, batch) of each of its updates."""
    progress, found = Progress(), list[tuple[int, list[tuple[int, int]]]]()
    while not found or not controller(workers, 1, 1, sizes, max_micro).done(progress):
        stage = controller(workers, 1, 1, sizes, max_micro).advance(progress).stage
        asked = workers(stage, sizes[min(stage, len(sizes) - 1)], max_micro)
        control = controller(workers, asked, asked, sizes, max_micro)
        predicted = [(s.plan.stage, s.plan.batch) for s in control.forecast(progress) for _ in range(s.updates)]
        updates: list[tuple[int, int]] = []
        while not control.done(progress):
            progress = control.advance(progress)
            if control.hands_over(progress.stage):
                break
            plan = control.plan(progress)
            assert (plan.world, control.ranks(plan.stage)) == (asked, asked)
            updates.append((plan.stage, plan.batch))
            progress = progress.after(plan, Outcome())
        assert updates == predicted  # a loader draws ahead to the hand-over and not beyond
        found.append((asked, updates))
    return found


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(ranges, by_stage), st.lists(st.integers(8, 60), min_size=1, max_size=5).map(sorted), st.integers(2, 20)
)
def test_groups_that_follow_one_another_take_the_updates_of_a_run_of_one_group(
    workers: Workers, sizes: list[int], max_micro: int
) -> None:
    taken = taken_by_groups(scaling_policy(workers), sizes, max_micro)
    [(_, whole)] = taken_by_groups(scaling_policy(1), sizes, max_micro)
    assert [update for _, updates in taken for update in updates] == whole
    assert all(updates for _, updates in taken)  # no group begins only to ask for another
    assert all(before != after for (before, _), (after, _) in pairwise(taken))


def test_a_group_that_was_given_fewer_than_it_asked_for_asks_again_at_the_next_change_only() -> None:
    given_two = controller(scaling_policy([1, 8]), 4, 2, [32, 33, 64, 8], 8)
    assert [given_two.hands_over(stage) for stage in range(4)] == [False, False, True, True]
    assert given_two.plan(Progress()).world == 2


def test_a_group_for_good_hands_over_to_nobody() -> None:
    control = Controller(growth=exponential(8), stages=every(samples=50), budget=budget(samples=400), epoch=1000)
    assert not any(control.hands_over(stage) for stage in range(9))


@pytest.mark.parametrize(
    ("written", "read", "edges"),
    [("4", 4, (4, 4)), ("[2, 8]", [2, 8], (2, 8)), ("[2,2]", [2, 2], (2, 2)), ("{0: 2, 3: 4}", None, (1, 4))],
)
def test_every_form_is_read_from_an_override_and_survives_yaml_and_json(
    written: str, read: Any, edges: tuple[int, int]
) -> None:
    run = run_of(f"launch.workers={written}")
    assert run.launch.workers == (read or {0: 2, 3: 4})
    assert (least(run.launch.workers), most(run.launch.workers)) == edges
    assert parse(yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json")))) == run
    assert run.launch.elastic == (read != 4)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("0", "launch.workers: 0 is no number of workers (1 or more); write a number, a range [least, most]"),
        ("2.5", "launch.workers: 2.5 is no number of workers"),
        ("true", "launch.workers: True is no number of workers"),
        ("many", "launch.workers: 'many' is no number of workers"),
        ("null", "launch.workers: None is no number of workers"),
        ("[8, 1]", "launch.workers: the range [8, 1] begins above its end; write [1, 8]"),
        ("[0, 8]", "launch.workers: [0, 8] is no range of two numbers from 1 on"),
        ("[1, 2, 3]", "launch.workers: [1, 2, 3] is no range of two numbers from 1 on"),
        ("[1, x]", "launch.workers: [1, 'x'] is no range of two numbers from 1 on"),
        ("{1: 2}", "launch.workers: {1: 2} does not say how many workers stage 0 has; add 0: 1"),
        ("{}", "launch.workers: {} does not say how many workers stage 0 has"),
        ("{0: 0}", "launch.workers: {0: 0} is no stage (0 or more) and its workers (1 or more)"),
        ("{0: 1, -1: 2}", "launch.workers: {-1: 2} is no stage"),
        ("{0: 1, late: 2}", "launch.workers: {'late': 2} is no stage"),
    ],
)
def test_a_wrong_form_is_told_with_what_is_allowed(written: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_of(f"launch.workers={written}")
    assert told in str(refused.value)


@pytest.mark.parametrize("workers", ["[20, 64]", "{0: 20, 1: 32}"])
def test_a_stage_whose_batch_has_fewer_rows_than_workers_is_refused_with_both(workers: str) -> None:
    with pytest.raises(ConfigError, match="stage 0: batch=16 is smaller than world=20: .* at most 16 workers"):
        run_of(f"launch.workers={workers}", "growth.start=16").controller().check()


def test_a_range_needs_to_know_how_large_a_micro_batch_may_be() -> None:
    with pytest.raises(ConfigError, match=r"launch.workers=\[1, 8\] follows engine.max_micro, which auto finds out"):
        run_of("launch.workers=[1, 8]", "engine.max_micro=auto")
    assert run_of("launch.workers={0: 1, 1: 2}", "engine.max_micro=auto").controller().ranks(1) == 2


def test_what_memory_is_asked_to_hold_is_the_largest_share_of_any_group() -> None:
    run = run_of("launch.workers={0: 4, 1: 1, 2: 8}", "engine.max_micro=auto", "growth.cap=64")
    assert run.controller().largest_share() == 32  # 16 on 4, 32 on 1, 64 on 8


def test_workers_that_share_no_folder_on_ray_cannot_hand_over() -> None:
    elsewhere = ("launch.workers={0: 1, 1: 2}", "launch.storage_path=s3://bucket/runs")
    with pytest.raises(ConfigError, match="all hosts must see run.dir: leave launch.storage_path out"):
        run_of(*elsewhere, "launch.kind=ray")
    assert run_of(*elsewhere).launch.elastic


def test_a_stage_is_checked_on_its_own_workers() -> None:
    run_of("launch.workers={0: 2, 3: 32}", "growth.start=8").controller().check()
    late = Controller(
        growth=constant(8), stages=every(samples=50), budget=budget(samples=400), epoch=1000,
        group=Group(scaling_policy=scaling_policy({0: 1, 2: 9}), asked=1),
    )  # fmt: skip
    late.check()  # a constant batch stays in stage 0


@given(st.integers(1, 8), st.integers(1, 80), st.integers(0, 60))
def test_a_run_goes_on_on_as_many_ranks_as_each_batch_to_come_has_rows(start: int, world: int, at: int) -> None:
    control = Controller(
        growth=exponential(start, 2.0, 64), stages=every(samples=100), budget=budget(samples=900), epoch=1000,
        world=world, max_micro=4,
    )  # fmt: skip
    one, progress = replace(control, world=1), Progress()
    for _ in range(at):
        if not one.done(progress):
            progress = one.advance(progress)
            progress = progress.after(one.plan(progress), Outcome())
    fewest, later = math.inf, progress
    while not one.done(later):
        later = one.advance(later)
        plan = one.plan(later)
        fewest, later = min(fewest, plan.batch), later.after(plan, Outcome())
    if world <= fewest:
        control.check(progress)
        control.check_resumed(lambda: progress)
    else:
        with pytest.raises(ConfigError, match=f"{world}"):
            control.check(progress)
        with pytest.raises(ConfigError, match=f"{world}"):
            control.check_resumed(lambda: progress)


def test_where_a_run_stands_is_not_looked_up_if_all_of_it_can_be_made() -> None:
    def never() -> Progress:
        raise AssertionError

    Controller(growth=constant(8), budget=budget(samples=80), epoch=100, world=8).check_resumed(never)
