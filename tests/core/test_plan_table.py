"""What `distgrow plan` tells of a run is what the run, taken update by update, would do."""

import math
import re
from pathlib import Path

import pytest

from distgrow.config.load import load
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Outcome, Progress
from distgrow.planning import check, table

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"
COSINE = "lr={base: 0.1, decay: {kind: cosine}}"


def run_of(*overrides: str) -> Run:
    """The digits' config with overrides."""
    return load(DIGITS, ["lr.base=0.1", *overrides])


def printed(out: str) -> tuple[list[list[str]], list[str]]:
    """The cells of the table's rows, and the lines below it."""
    lines = out.splitlines()[1:]
    rows = [
        re.split(r"\s{2,}", line.strip()) for line in lines if re.match(r"\s*(\d|… )", line) and "updates" not in line
    ]
    return rows, [line for line in lines if "gradient evaluations" in line or "predicted" in line]


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ()),
        (3, ("engine.max_micro=5",)),
        (2, ("growth={kind: linear, start: 7, increment: 5, cap: 60}", "budget={samples: 12345}")),
        (1, ("growth={kind: list, batches: [5, 90, 11]}", "stages={every: {steps: 30}}", "budget={steps: 100}")),
        (2, ("growth={kind: seesaw, start: 8, cap: 64}", "stages={}", COSINE, "budget={epochs: 3.3}")),
    ],
)
def test_the_table_is_what_stepping_through_the_run_gives(
    world: int, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(*overrides)
    control = run.controller(world)
    stages: dict[int, list[tuple[Progress, Progress, float]]] = {}
    progress = Progress()
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        after = progress.after(plan, Outcome())
        stages.setdefault(plan.stage, []).append((progress, after, plan.lr))
        progress = after
    assert table.show(run, world, rows=100)
    rows, (total, *_) = printed(capsys.readouterr().out)
    assert [number(row[0]) for row in rows] == list(stages)
    for row, updates in zip(rows, stages.values(), strict=True):
        first, last = updates[0][0], updates[-1][1]
        _, epoch, samples, steps, batch, shape, lr, sfo = row
        assert number(samples) == last.samples - first.samples
        assert number(steps) == len(updates)
        assert number(batch) == control.plan(first).batch
        assert number(sfo) == last.ledger.total
        assert [number(part) for part in shape.split(" × ")][0] == world
        assert math.prod(number(part) for part in shape.split(" × ")) >= number(batch)
        assert float(epoch) == pytest.approx(last.samples / 1437, abs=0.006)
        shown = [float(rate) for rate in lr.split(" – ")]
        rates = [rate for before, after, rate in updates if after.samples - before.samples == number(batch)]
        assert [shown[0], shown[-1]] == pytest.approx([rates[0], rates[-1]], rel=1e-3, abs=1e-9)
    assert f"{len(stages)} stages, {progress.step:,} updates, {progress.ledger.total:,} gradient evaluations" in total


@pytest.mark.parametrize("length", [16, 200, 287, 288, 289, 303, 304, 305, 319, 320, 321, 5000])
@pytest.mark.parametrize("kind", ["exponential", "constant"])
def test_growth_that_the_budget_ends_before_it_begins_is_told(
    kind: str, length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(
        f"growth={{kind: {kind}, start: 16}}", f"stages={{every: {{samples: {length}}}}}", "budget={samples: 320}"
    )
    control = run.controller(1)
    progress = Progress()
    while not control.done(progress):
        progress = control.advance(progress)
        progress = progress.after(control.plan(progress), Outcome())
    assert table.show(run, 1, rows=100)
    told = "never grows: the first stage of growth.kind=exponential is longer" in capsys.readouterr().out
    assert told == (kind == "exponential" and progress.stage == 0)


def test_the_manuals_plan_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.show(load(DIGITS), 2, rows=40)
    shown = "".join(f"{line.rstrip()}\n" for line in capsys.readouterr().out.splitlines())
    assert (
        f"$ distgrow plan configs/digits.yaml --world 2\n{shown}```" in (DIGITS.parents[1] / "docs/use.md").read_text()
    )


def test_of_many_stages_the_first_and_the_last_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("growth={kind: linear, start: 8, increment: 1}", "stages={every: {steps: 2}}", "budget={steps: 200}")
    assert table.show(run, 1, rows=20)
    rows, (total,) = printed(capsys.readouterr().out)
    assert [row[0] for row in rows] == [*map(str, range(15)), "… 80 more", *map(str, range(95, 100))]
    assert total.startswith("100 stages, 200 updates")


@pytest.mark.parametrize("decay", ["none", "cosine"])
def test_a_common_plan_fits_eighty_columns(decay: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.show(run_of(f"lr={{base: 0.1, decay: {{kind: {decay}}}}}"), 2, rows=20)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "updates" not in line) <= 80


def test_a_number_of_any_length_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("growth={kind: constant, start: 1437}", "budget={samples: 1234567890123456789}")
    assert table.show(run, 1, rows=20)
    assert capsys.readouterr().out.count("1,234,567,890,123,456,789") == 3


def test_every_violated_constraint_is_told_but_not_a_million_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert not table.show(run_of(), 100, rows=20)
    told = capsys.readouterr().err.splitlines()
    assert [re.findall(r"stage (\d).*batch=(\d+) is smaller than world=100", line) for line in told] == [
        [("0", "16")], [("1", "32")], [("2", "64")]
    ]  # fmt: skip
    tight = run_of(
        "growth={kind: linear, start: 1400, increment: 1}", "stages={every: {steps: 1}}", "budget={steps: 200}"
    )
    assert not table.show(tight, 1, rows=20)
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_a_micro_batch_that_is_not_measured_yet_is_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.show(run_of("engine.max_micro=auto"), 2, rows=40)
    shown = capsys.readouterr().out
    assert "engine.max_micro=auto: shown as if memory held every share" in shown
    assert all(" × 1 " in line for line in shown.splitlines() if line.count("×") == 2 and "batch" not in line)


@pytest.mark.parametrize(("zero", "max_micro", "told"), [(1, 4, False), (2, 256, False), (2, 4, True), (3, 4, True)])
def test_what_accumulation_costs_under_zero_2_and_3_is_said(
    zero: int, max_micro: int, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table.show(run_of(f"engine={{kind: deepspeed, zero: {zero}, max_micro: {max_micro}}}"), 2, rows=40)
    line = f"ZeRO {zero} reduces every micro-batch: up to 32 reductions an update"
    assert (line in capsys.readouterr().out) == told


# ── adaptive growth ─────────────────────────────────────────────────────────────────────────────────────────────

TRACKING = ("growth={kind: tracking, kappa: 0.5, start: 8, cap: 64, dwell: {epochs: 2}}", "stages={}", "lr={}")


def bounds(out: str) -> dict[str, str]:
    """What is printed below each title."""
    parts = re.split(r"(?m)^\w+ growth (at \w+).*\n", out)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_adaptive_growth_is_shown_as_the_run_that_never_moves_and_the_one_that_moves_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert table.show(run_of(*TRACKING), 1, rows=20)
    shown = bounds(capsys.readouterr().out)
    assert list(shown) == ["at slowest", "at fastest"]
    slowest, _ = printed(shown["at slowest"])
    assert [[row[0], number(row[4])] for row in slowest] == [["0", 8]]
    fastest, (total,) = printed(shown["at fastest"])
    assert [(row[0], number(row[4]), number(row[2])) for row in fastest[:-1]] == [("0", 8, 2880), ("2", 32, 2880)]
    assert (fastest[-1][0], number(fastest[-1][4])) == ("3", 64)
    assert "57,480 gradient evaluations" in total


def test_exact_probes_are_added_to_the_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("growth={kind: adaptive, start: 8, cap: 64, every: 100}", "stages={}", "budget={samples: 8000}")
    assert table.show(run_of(*overrides), 1, rows=20)
    shown = bounds(capsys.readouterr().out)
    assert f"and 9 probes of ‖∇f‖: {9 * 1437:,} gradient evaluations more" in shown["at slowest"]
    assert f"and 3 probes of ‖∇f‖: {3 * 1437:,} gradient evaluations more" in shown["at fastest"]


def test_a_stage_that_adaptive_growth_may_come_to_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("growth={kind: gns, start: 8, cap: 2048}", "stages={}")
    assert not table.show(run, 1, rows=20)
    assert "of stage 8 exceeds the 1437 samples" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="of stage 8 exceeds the 1437 samples"):
        check.check(run, 1)


def test_adascales_learning_rates_are_said_to_be_without_its_gain(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.show(run_of("growth={kind: adascale, scale: 4}", "stages={}", "lr={base: 0.1}"), 1, rows=20)
    assert "as if AdaScale's gain were 1" in capsys.readouterr().out


def test_plan_tells_of_reductions_and_compilations_of_shards(capsys: pytest.CaptureFixture[str]) -> None:
    growth = "growth={kind: exponential, start: 8, factor: 2, cap: 64}"
    keys = ("stages={every: {samples: 100}}", "budget={samples: 1000}")
    table.show(run_of(growth, *keys, "engine={kind: fsdp, reduce: every, compile: true, max_micro: 16}"), None, 40)
    shown = " ".join(capsys.readouterr().out.split())
    assert "up to 4 reductions an update; reduce=last needs one" in shown
    assert "compiles for 2 sizes of micro-batches, 8 to 16 rows; engine.max_micro=8" in shown


@pytest.mark.parametrize(("micro", "told"), [(16, True), (8, False)])
def test_plan_tells_of_compilations_of_plain_torch(micro: int, told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    growth = ("growth={kind: exponential, start: 8, factor: 2, cap: 64}", "stages={every: {samples: 100}}")
    table.show(run_of(*growth, "budget={samples: 1000}", f"engine={{compile: true, max_micro: {micro}}}"), None, 40)
    assert ("compiles for 2 sizes" in capsys.readouterr().out) == told
