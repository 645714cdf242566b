"""What `distgrow plan` tells of seconds and worker-seconds is what adding them up update by update gives."""

import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Script

from distgrow.config.load import load
from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace, Stretch, cost, fitted
from distgrow.core.progress import Outcome, Progress
from distgrow.planning import table
from distgrow.planning.cost import measured

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"
PACE = Pace(samples_per_s=500.0, latency_s=0.02, resize_s=7.0)
RANGE = ("launch.workers=[1, 8]", "engine.max_micro=32")

stretches = st.lists(
    st.builds(
        lambda batch, updates, world: Stretch(batch=batch, updates=updates, world=world),
        st.integers(1, 300), st.integers(1, 20), st.integers(1, 9),
    ), min_size=1, max_size=6,
)  # fmt: skip


@given(stretches, st.floats(1, 1e4), st.floats(0, 1), st.floats(0, 100))
def test_a_cost_is_the_sum_over_updates_and_resizes(
    run: list[Stretch], samples_per_s: float, latency_s: float, resize_s: float
) -> None:
    wall = held = 0.0
    worlds = [stretch.world for stretch in run for _ in range(stretch.updates)]
    batches = [stretch.batch for stretch in run for _ in range(stretch.updates)]
    for at, (batch, world) in enumerate(zip(batches, worlds, strict=True)):
        if at and world != worlds[at - 1]:
            wall += resize_s
            held += resize_s * max(world, worlds[at - 1])
        largest_share = max(batch * (k + 1) // world - batch * k // world for k in range(world))
        wall += latency_s + largest_share / samples_per_s
        held += (latency_s + largest_share / samples_per_s) * world
    found = cost(Pace(samples_per_s=samples_per_s, latency_s=latency_s, resize_s=resize_s), run)
    assert found.seconds == pytest.approx(wall)
    assert found.worker_seconds == pytest.approx(held)
    assert found.resizes == sum(a != b for a, b in zip(worlds, worlds[1:], strict=False))


def test_the_plan_tells_what_stepping_through_the_run_takes(capsys: pytest.CaptureFixture[str]) -> None:
    run = load(DIGITS, RANGE)
    control, progress = run.controller(), Progress()
    wall = held = fixed = before = 0.0
    while not control.done(progress):
        progress = control.advance(progress)
        batch = control.plan(progress).batch
        world = min(8, max(1, 16 * 2**progress.stage // 32))
        resize = 7.0 if before not in (0, world) else 0.0
        seconds = 0.02 + math.ceil(batch / world) / 500
        wall, held = wall + seconds + resize, held + seconds * world + resize * max(before, world)
        fixed += 0.02 + math.ceil(batch / 8) / 500
        before = world
        progress = progress.after(control.plan(progress), Outcome())
    assert table.show(run, None, 40, PACE)
    planned, throughout = capsys.readouterr().out.splitlines()[-2:]
    assert planned.endswith(f"7 s a resize: {wall:,.1f} s, {held:,.1f} worker-seconds, 3 resizes")
    assert throughout.startswith(f"on 8 workers throughout: {fixed:,.1f} s, {fixed * 8:,.1f} worker-seconds; saved: ")
    assert f"{fixed * 8 - held:,.1f} worker-seconds ({1 - held / fixed / 8:.1%})" in throughout
    assert f"for {wall - fixed:,.1f} s more" in throughout


def test_the_table_gives_each_stage_its_own_workers_and_world_overrides_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = load(DIGITS, RANGE)
    assert table.show(run, None, 40)
    assert re.findall(r"(\d) × \d+ × \d+", capsys.readouterr().out) == ["1", "1", "2", "4", "8"]
    assert table.show(run, 3, 40, PACE)
    shown = capsys.readouterr().out
    assert set(re.findall(r"(\d) × \d+ × \d+", shown)) == {"3"}
    assert "0 resizes" in shown
    assert "throughout" not in shown


def test_what_the_manual_shows_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    given = "launch.pace={samples_per_s: 2000, latency_s: 0.05, resize_s: 5}"
    run = load(DIGITS, [*RANGE, given])
    assert table.show(run, None, 40, run.launch.pace)
    shown = "".join(f"{line}\n" for line in capsys.readouterr().out.splitlines()[-2:])
    assert f"    '{given}'\n…\n{shown}$" in (DIGITS.parents[1] / "docs/operations.md").read_text()


def test_where_resizing_costs_more_than_idle_workers_it_is_called_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.show(load(DIGITS, RANGE), None, 40, PACE.model_copy(update={"resize_s": 1e4}))
    assert "; lost: " in capsys.readouterr().out.splitlines()[-1]


@settings(deadline=None)
@given(st.floats(10, 1e4), st.floats(1e-4, 1), st.integers(0, 2**30))
def test_a_pace_is_found_again_from_the_updates_that_it_makes_hiccups_or_not(
    samples_per_s: float, latency_s: float, seed: int
) -> None:
    pace, chance = Pace(samples_per_s=samples_per_s, latency_s=latency_s), random.Random(seed)
    updates = [
        (batch, world, pace.update_s(batch, world) * (50 if number == 0 or chance.random() < 0.2 else 1))
        for batch, world in [(8, 1), (16, 2), (64, 2), (256, 3)]
        for number in range(101)
    ]
    chance.shuffle(updates)
    found = fitted(updates, [3.0, 90.0, 4.0])
    assert found.samples_per_s == pytest.approx(samples_per_s)
    assert found.latency_s == pytest.approx(latency_s, rel=1e-6, abs=1e-9 / samples_per_s)
    assert found.resize_s == 4.0


def test_no_latency_is_below_zero() -> None:
    found = fitted([(10, 1, 0.5), (20, 1, 2.0)] * 3)
    assert found.latency_s == 0.0
    best = min((sum((r / rate - s) ** 2 for r, s in [(10, 0.5), (20, 2.0)]), rate) for rate in range(1, 100))[1]
    assert found.samples_per_s == pytest.approx(best, abs=0.5)


@pytest.mark.parametrize(
    ("updates", "told"),
    [
        ([], "these are none"),
        ([(8, 1, 0.1)] * 4, "these are 4 of 8 on 1; name a run on a fixed world whose batch grew"),
        ([(8, 1, 0.1), (16, 2, 0.2)] * 3, "these are 3 of 8 on 1, 3 of 16 on 2"),
        ([(8, 1, 0.1)] * 3 + [(80, 1, 0.5)] * 2, "these are 3 of 8 on 1, 2 of 80 on 1"),
        ([(8, 1, 0.1), (11, 1, 0.2)] * 3, "3 updates each with few and with many rows per worker (1.5 times as many"),
        ([(8, 1, 0.2), (16, 1, 0.1)] * 3, "took no longer"),
        ([(8, 1, 0.2), (16, 1, 0.2)] * 3, "took no longer"),
    ],
)
def test_updates_that_do_not_tell_a_pace_are_refused(updates: list[tuple[int, int, float]], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        fitted(updates)


def scripted(*batches: int) -> Script:
    """A run whose updates take 0.1 s and 1 ms a sample."""
    script = Script().event("start")
    for stage, batch in enumerate(batches):
        script.stage(stage, batch, batch).updates(1.0, 1.0, 1.0)
    for event in script.events:
        if event["event"] == "step":
            event.update(world=1, samples_per_s=event["batch"] / (0.1 + event["batch"] / 1000))
    return script


def test_the_pace_of_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = scripted(8, 16, 64).save(tmp_path / "plain")
    assert measured(folder) == measured(folder, PACE.model_copy(update={"resize_s": 0.0}))
    assert measured(folder).samples_per_s == pytest.approx(1000)
    assert measured(folder).latency_s == pytest.approx(0.1)
    assert measured(folder, PACE).resize_s == 7.0
    resized = scripted(8, 16).event("resize", old=1, new=2, wanted=2, seconds=5.0).save(tmp_path / "resized")
    assert measured(resized, PACE).resize_s == 5.0


def test_a_folder_that_tells_no_pace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--like .*nowhere.*does not exist"):
        measured(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--like .*same: a pace needs 3 updates .* these are 6 of 8 on 1"):
        measured(scripted(8, 8).save(tmp_path / "same"))
    with pytest.raises(ConfigError, match="--like .*torn: a pace needs 3 updates"):
        measured(Script().stage(0, 8, 8).updates(1.0).save(tmp_path / "torn"))
