"""What has been done is counted once, in one place, and survives being written down."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.core.plan import Plan
from distgrow.core.progress import Ledger, Outcome, Progress, finite

APPLIED, SKIPPED = Outcome(applied=True), Outcome(applied=False)
counts = st.integers(0, 10**12)
batches = st.integers(1, 10**6)
ledgers = st.builds(Ledger, applied=counts, skipped=counts, replayed=counts, discarded=counts, probe=counts)
progresses = st.builds(
    Progress,
    step=counts,
    samples=counts,
    stage=counts,
    stage_samples=counts,
    stage_step=counts,
    skips=counts,
    micro_limit=st.none() | batches,
    policy=st.dictionaries(st.text(max_size=5), counts | st.floats(0, 1e12), max_size=3),
    ledger=ledgers,
)


def plan(batch: int, *, micro: int = 4, probe: bool = False) -> Plan:
    """An update of `batch` samples on one rank."""
    return Plan(batch=batch, world=1, micro=micro, accum=1, lr=0.1, stage=0, probe=probe)


@given(progresses, batches)
def test_an_applied_update_moves_everything_but_the_stage(before: Progress, batch: int) -> None:
    after = before.after(plan(batch), APPLIED)
    assert after.policy == before.policy
    assert (after.step, after.stage_step) == (before.step + 1, before.stage_step + 1)
    assert (after.samples, after.stage_samples) == (before.samples + batch, before.stage_samples + batch)
    assert (after.stage, after.skips) == (before.stage, 0)
    assert after.ledger == replace(before.ledger, applied=before.ledger.applied + batch)


@given(progresses, batches)
def test_a_skipped_update_moves_only_the_cursor_and_its_cost(before: Progress, batch: int) -> None:
    ledger = replace(before.ledger, skipped=before.ledger.skipped + batch)
    wanted = replace(before, samples=before.samples + batch, skips=before.skips + 1, ledger=ledger)
    assert before.after(plan(batch), SKIPPED) == wanted


@given(progresses, batches)
def test_an_update_that_ran_out_of_memory_costs_its_batch_and_halves_the_micro_batch(
    before: Progress, batch: int
) -> None:
    ledger = replace(before.ledger, discarded=before.ledger.discarded + batch)
    after = before.after(plan(batch, micro=7), Outcome(applied=False, out_of_memory=True))
    assert after == replace(before, micro_limit=3, ledger=ledger)


@given(progresses, batches, st.booleans())
def test_a_probe_costs_its_batch_and_moves_nothing(before: Progress, batch: int, out_of_memory: bool) -> None:
    ledger = replace(before.ledger, probe=before.ledger.probe + batch)
    outcome = Outcome(applied=False, out_of_memory=out_of_memory)
    assert before.after(plan(batch, probe=True), outcome) == replace(before, ledger=ledger)


@given(st.lists(st.tuples(batches, st.booleans()), max_size=30))
def test_the_ledger_adds_up_over_any_history(history: list[tuple[int, bool]]) -> None:
    progress = Progress()
    for batch, applied in history:
        progress = progress.after(plan(batch), Outcome(applied=applied))
    assert progress.ledger.applied == sum(batch for batch, applied in history if applied)
    assert progress.ledger.skipped == sum(batch for batch, applied in history if not applied)
    assert progress.samples == progress.ledger.total == sum(batch for batch, _ in history)
    assert progress.step == sum(applied for _, applied in history)
    last_applied = max((k + 1 for k, (_, applied) in enumerate(history) if applied), default=0)
    assert progress.skips == len(history) - last_applied


def test_totals_count_each_column_once() -> None:
    ledger = Ledger(applied=1, skipped=20, replayed=300, discarded=4_000, probe=50_000)
    assert ledger.total == 54_321
    assert ledger.first_time == 50_021


@given(progresses, st.integers(1, 1000), st.integers(0, 20))
def test_a_stride_is_its_updates_one_by_one(before: Progress, batch: int, updates: int) -> None:
    one_by_one = before
    for _ in range(updates):
        one_by_one = one_by_one.after(plan(batch), APPLIED)
    assert before.repeat(batch, updates) == one_by_one


@given(progresses, st.integers(1, 50))
def test_growing_restarts_the_stage_and_nothing_else(before: Progress, stages: int) -> None:
    wanted = replace(before, stage=before.stage + stages, stage_samples=0, stage_step=0)
    assert before.grow(stages) == wanted
    assert before.grow(0) == before


@given(progresses, counts)
def test_replayed_work_is_charged_without_moving_the_run(before: Progress, lost: int) -> None:
    after = before.replaying(lost)
    assert after.ledger.total == before.ledger.total + lost
    assert after.ledger.first_time == before.ledger.first_time
    assert replace(after, ledger=before.ledger) == before


@settings(max_examples=50)
@given(progresses)
def test_progress_survives_json(progress: Progress) -> None:
    assert Progress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress


@given(progresses, counts, st.floats(0, 1e9), st.floats(0, 1e9), counts)
def test_a_file_that_has_a_field_for_each_number_of_a_policy_is_read(
    progress: Progress, cooling: int, worth: float, norm: float, step: int
) -> None:
    values = {key: value for key, value in progress.to_dict().items() if key != "policy"}
    none = {"cooling": 0, "worth": 0.0, "probe_norm": None, "probe_step": None}
    for old, new in (
        ({}, {}),
        ({"cooling": cooling}, {"drops": cooling} if cooling else {}),
        ({"worth": worth}, {"samples": worth} if worth else {}),
        ({"probe_norm": norm, "probe_step": step}, {"norm": norm, "norm_step": step}),
    ):
        assert Progress.from_dict({**values, **none, **old}) == replace(progress, policy=new)


def test_progress_from_a_file_with_unknown_counts_is_refused() -> None:
    with pytest.raises(TypeError):
        Progress.from_dict({**Progress().to_dict(), "epoch": 3})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_are_none(value: float) -> None:
    assert finite(value) is None
    assert finite(1.5) == 1.5
