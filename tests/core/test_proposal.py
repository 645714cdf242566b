"""A proposed schedule has the wished updates, divides over the workers, and its rate is stable at one temperature."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distgrow.config.load import parse
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Outcome, Progress
from distgrow.critical_batch.proposal import Proposal, Rates, Wish, probed_batch, propose
from distgrow.critical_batch.range_test import range_test
from distgrow.theory.noise import fastest_batch

SAMPLES = 64_000


def run_of(**changed: Any) -> Run:
    return parse({"task": {"kind": "digits"}, "budget": {"samples": SAMPLES}, "lr": {"base": 0.1}, **changed})


def stepped(proposal: Proposal, workers: int) -> tuple[int, int]:
    """Return the updates and the last full batch of a run, made one after the other."""
    controller, progress, largest = proposal.run.controller(workers), Progress(), 0
    while not controller.done(progress):
        progress = controller.advance(progress)
        plan = controller.plan(progress)
        largest = max(largest, controller.growth.stage_batch(progress.stage))
        progress = controller.after(progress, plan, Outcome())
    assert progress.ledger.applied == SAMPLES
    return progress.step, largest


@settings(max_examples=25)
@example(1921, 8, ("sgd", 1.0), {"kind": "wsd", "decay": 0.2, "warmup": 0.05})
@given(
    st.integers(760, 4000),
    st.sampled_from([1, 3, 4, 8]),
    st.sampled_from([("sgd", 1.0), ("adamw", 0.5)]),
    st.sampled_from([{"kind": "none"}, {"kind": "wsd", "decay": 0.2, "warmup": 0.05}]),
)
def test_a_wish_of_updates_is_met_within_two_percent(
    steps: int, workers: int, optimizer: tuple[str, float], decay: dict[str, Any]
) -> None:
    kind, power = optimizer
    run = run_of(optimizer={"kind": kind}, lr={"base": 0.1, "decay": decay}, growth={"kind": "constant", "start": 32})
    rates = Rates(batch=32, proposed=0.1, largest=0.2)
    found = propose(run, Wish(workers=workers, steps=steps), rates)
    made, largest = stepped(found, workers)
    # from where the rate falls on, the last fifth, no batch begins to grow: the next one gives that many fewer, or none
    gap = 0.2 * workers / (found.start + workers) if decay["kind"] == "wsd" else 0.0
    assert made == found.updates == pytest.approx(steps, rel=max(0.02, 1.05 * gap / 2))
    assert found.start % workers == found.cap % workers == 0
    assert largest <= found.cap
    assert found.lr == pytest.approx(min(0.2, 0.1 * (found.start / 32) ** power))


def share(doublings: int) -> float:
    """Return the updates of b₀·2^m up to m = `doublings`, over those of b₀.

    The line is 1/(1 − z), z the samples' share. The batch is 2^m·b₀ from where the line is 2^(m − ½), so
    for z from 1 − 2^(½ − m).
    """
    begins = [0.0, *(1 - 2 ** (0.5 - m) for m in range(1, doublings + 1)), 1.0]
    return sum((begins[m + 1] - begins[m]) / 2**m for m in range(doublings + 1))


@pytest.mark.parametrize("doublings", [1, 2, 3])
def test_the_cap_for_a_wish_is_that_of_the_line_in_closed_form(doublings: int) -> None:
    steps = round(SAMPLES / 16 * share(doublings))
    found = propose(run_of(), Wish(steps=steps), Rates(batch=16, proposed=0.1, largest=0.1))
    assert found.start == 16
    assert found.cap / 16 == pytest.approx(2**doublings, rel=0.1)


def test_a_larger_first_batch_is_taken_only_as_growth_alone_makes_too_many_updates() -> None:
    rates = Rates(batch=16, proposed=0.1, largest=0.4)
    assert propose(run_of(), Wish(steps=2150), rates).start == 16  # at least 2,115
    found = propose(run_of(), Wish(steps=1000), rates)
    assert found.start == pytest.approx(SAMPLES * share(9) / 1000, rel=0.05)
    assert found.lr == pytest.approx(0.1 * found.start / 16)
    least = SAMPLES * share(9) / 64  # b₀ = 4·16, where the rate is the largest
    assert propose(run_of(), Wish(steps=math.ceil(1.05 * least)), rates).lr <= 0.4
    with pytest.raises(ConfigError, match=r"--steps=450: .* the fewest updates are 5\d\d, from b₀ 64 on at lr 0.4"):
        propose(run_of(), Wish(steps=450), rates)
    smaller = propose(run_of(), Wish(steps=8000), rates)  # more than S/b₀: a smaller batch, and a lower rate
    assert (smaller.start, smaller.lr) == (8, pytest.approx(0.05))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 700)))
def test_batches_divide_over_the_workers_and_the_cap_fills_their_micro_batches(
    workers: int, micro: int, start: int, critical: int | None
) -> None:
    rates = Rates(batch=start, proposed=0.1, largest=0.15)
    found = propose(run_of(), Wish(workers=workers, micro=micro), rates, critical)
    assert found.start == math.ceil(start / workers) * workers
    assert found.lr == pytest.approx(min(0.15, 0.1 * found.start / start))
    assert found.cap % workers == 0
    if critical is not None:
        assert found.cap <= max(critical, found.start)
    full = workers * micro
    if found.cap > found.start and (critical or 0) >= full:
        assert found.cap % full == 0


def test_without_a_critical_batch_the_cap_is_the_fastest_batch_where_pace_and_noise_are_known() -> None:
    pace = {"samples_per_s": 1000.0, "latency_s": 0.08}
    theory = {"smoothness": 1.0, "variance": 500.0, "gap": 1.0, "epsilon": 1.0}
    run = run_of(launch={"pace": pace}, theory=theory)
    found = propose(run, Wish(workers=4), Rates(batch=16, proposed=0.1, largest=0.1))
    assert fastest_batch(0.08, 4000.0, 500.0) == pytest.approx(math.sqrt(0.08 * 4000 * 500))
    assert found.cap == 400


def test_the_keys_that_are_saved_are_those_of_the_schedule() -> None:
    wish = Wish(workers=2, micro=8, steps=2500)
    run = run_of(lr={"base": 0.1, "decay": {"kind": "wsd", "decay": 0.1}}, stages={"every": {"samples": 900}})
    found = propose(run, wish, Rates(batch=16, proposed=0.1, largest=0.1))
    saved = parse({**run.model_dump(mode="json"), **yaml.safe_load(found.text(wish))})
    assert (saved.growth.start, saved.lr.initial, saved.lr.decay) == (found.start, found.lr, run.lr.decay)
    assert sum(count for _, _, count in saved.controller().outline(Progress())) == found.updates


def test_what_probe_batch_has_left_in_the_run_is_found(tmp_path: Path) -> None:
    assert probed_batch(tmp_path) is None
    for step, batches in (("00000010", (64, 32)), ("00000200", (256, 128))):
        lines = [{"event": "branch"}, {"event": "result", "training_batch": batches[0], "test_batch": batches[1]}]
        (tmp_path / f"probe-batch-step-{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert probed_batch(tmp_path) == 128


@pytest.mark.parametrize(
    ("wish", "changed", "told"),
    [
        (Wish(micro=8), {}, "--micro=8: .*give --workers .*leave --micro out"),
        (Wish(steps=8), {"budget": {"steps": 100}}, "budget.steps=100 leaves open"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_before_anything_is_measured(
    wish: Wish, changed: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        range_test(run_of(**changed), 20, None, wish)


def test_more_updates_than_rows_for_the_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--steps=20000: .* at most 16,000"):
        propose(run_of(), Wish(workers=4, steps=20_000), Rates(batch=16, proposed=0.1, largest=0.1))
    with pytest.raises(ConfigError, match="--save=x: there is nothing to save"):
        range_test(run_of(), 20, None, None, "x")
