"""What the plots of a report show: the lines of runs that are written by hand, their scales, their legend."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D
from scripted import Script, crashed, short

from distgrow.report.curves import Curve, curve, smooth, thin
from distgrow.report.plots import draw
from distgrow.report.runs import read
from distgrow.report.sections import stages


def lines(folder: str, panel: int, axis: str = "step") -> list[list[tuple[float, float]]]:
    """The points of all lines that are drawn in a panel."""
    drawn = draw(read([folder]), axis).axes[panel].lines
    return [list(zip(xs(line), ys(line), strict=True)) for line in drawn]


def xs(line: Line2D) -> list[float]:
    """Where a line's points are."""
    return np.asarray(line.get_xdata(), dtype=float).tolist()


def ys(line: Line2D) -> list[float]:
    """A line's values."""
    return np.asarray(line.get_ydata(), dtype=float).tolist()


def legend(*runs: str) -> list[str]:
    """The names that the plots of some runs show."""
    return [text.get_text() for text in draw(read(runs), "sfo").legends[0].get_texts()]


def test_what_a_resume_went_back_over_is_not_plotted_twice(tmp_path: Path) -> None:
    run = crashed().save(tmp_path / "run")
    assert lines(run, 0)[0] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert lines(run, 0, "sfo")[0] == [(8, 2.0), (32, 1.0), (40, 0.5)]  # 16 were lost
    assert lines(run, 0, "time_s")[0] == [(0.5, 2.0), (2.0, 1.0), (2.5, 0.5)]
    assert [panel.get_ylabel() for panel in draw(read([run]), "sfo").axes][
        1
    ] == "gradient norm"  # no evaluation is left
    assert "resumed" in legend(run)


def test_each_panel_shows_what_its_label_says(tmp_path: Path) -> None:
    figure = draw(read([short().save(tmp_path / "run")]), "sfo")
    shown = {panel.get_ylabel(): ys(panel.lines[0]) for panel in figure.axes}
    assert shown == {
        "training loss": [2.0, 1.0, 0.5, 0.25, 0.2],
        "test loss": [0.5],
        "test accuracy": [0.75],
        "gradient norm": [4.0, 2.0, 1.0, 0.5, 0.4],
        "batch (samples)": [8, 8, 8, 16, 16, 16],
        "learning rate": [0.08, 0.08, 0.08, 0.16, 0.16, 0.16],
    }
    assert "SFO" in figure.axes[-1].get_xlabel()


def test_the_full_gradient_norm_has_a_panel_where_it_was_measured(tmp_path: Path) -> None:
    measured = short().event("probe", norm=0.5, sfo=99).save(tmp_path / "measured")
    tried = short().event("probe", micro=8, fits=True, sfo=99).save(tmp_path / "tried")
    figure = draw(read([measured]), "sfo")
    shown = {panel.get_ylabel(): panel for panel in figure.axes}
    assert ys(shown["full gradient norm"].lines[0]) == [0.5]
    assert "full gradient norm" not in {panel.get_ylabel() for panel in draw(read([tried]), "sfo").axes}


def test_several_runs_are_in_one_legend_and_look_different(tmp_path: Path) -> None:
    runs = [short().save(tmp_path / f"run{index}") for index in range(21)]
    figure = draw(read(runs), "sfo")
    handles = figure.legends[0].get_lines()[:21]
    assert legend(*runs) == [*(f"run{index}" for index in range(21)), "new stage"]
    assert len({(handle.get_color(), handle.get_linestyle()) for handle in handles}) == 21


def test_runs_with_the_same_folder_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "sgd" / "1" / "run", tmp_path / "sgd" / "2" / "run", tmp_path / "adam" / "1" / "run"]
    runs = [short().save(path) for path in paths]
    assert legend(*runs[:2])[:-1] == ["1/run", "2/run"]
    assert legend(*runs)[:-1] == ["sgd/1/run", "sgd/2/run", "adam/1/run"]


def test_the_legend_shows_any_name_as_it_is(tmp_path: Path) -> None:
    names = ["<b>a&b<b>", "a$x^$b", "$$", "_hidden", "x" * 200]
    shown = legend(*(short().save(tmp_path / name) for name in names))
    assert [name.replace("\n", "") for name in shown[:-1]] == names


def test_a_run_named_twice_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = short().save(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert legend(run, "run", "./run/", "run/../run") == ["run", "new stage"]


def test_skipped_updates_leave_a_mark_and_a_loss_of_null_leaves_a_gap(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(1.0).skip().updates(None, 0.5).end()
    run = script.save(tmp_path / "run")
    assert lines(run, 0)[0] == [(1, 1.0), (3, 0.5)]
    assert [x for x, _ in lines(run, 0, "sfo")[-1]] == [16]
    assert "update skipped" in legend(run)


def marks(folder: str, axis: str = "step", panel: int = 0) -> dict[str, list[float]]:
    """Where the markers of each kind are in a panel."""
    drawn = draw(read([folder]), axis).axes[panel].lines
    return {str(line.get_gid()): xs(line) for line in drawn if line.get_gid()}


def test_what_happened_is_marked_on_the_curves_at_its_place_on_each_axis(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(4.0, 2.0).stage(1, 16, 16).updates(1.0).event("oom", micro=16)
    script.event("resize", old=1, new=2, seconds=1.0).updates(0.5).skip().updates(0.25)
    script.event("resume", checkpoint="step-00000005").stage(1, 16, 16).updates(0.2)
    run = script.save(tmp_path / "run")
    assert marks(run) == {"stage": [2], "oom": [3], "resize": [3], "skip": [4], "resume": [5]}
    assert marks(run, "sfo") == {"stage": [16], "oom": [32], "resize": [32], "skip": [64], "resume": [80]}
    assert marks(run, "time_s") == {"stage": [1.0], "oom": [1.5], "resize": [1.5], "skip": [2.5], "resume": [3.0]}
    assert marks(run, panel=1) == marks(run)  # the gradient norm
    assert legend(run) == ["run", "new stage", "workers change", "resumed", "update skipped", "out of memory"]


def test_hundreds_of_stages_leave_few_marks_apart_from_each_other(tmp_path: Path) -> None:
    script = Script()
    for stage in range(400):
        script.stage(stage, 8 + stage, 8 + stage).updates(1.0)
    found = marks(script.save(tmp_path / "run"))["stage"]
    assert len(found) == 40
    assert min(np.diff(found)) >= 10


def test_estimates_of_the_critical_batch_are_on_the_batchs_axis_where_they_are_known(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(*[1.0] * 4).event("probe", norm=1.0, critical_batch=24.0)
    script.event("probe", norm=1.0, critical_batch=None).end()
    steps = [event for event in script.events if event["event"] == "step"]
    for event, scale in zip(steps, [None, 30.0, 60.0, -5.0], strict=True):  # an estimate may fall below 0
        event["noise_scale"] = scale
    run = script.save(tmp_path / "run")
    panel = next(place for place in draw(read([run]), "step").axes if place.get_ylabel().startswith("batch and"))
    scale, probed = panel.lines[1:3]
    assert [(x, y) for x, y in zip(xs(scale), ys(scale), strict=True) if y == y] == [(2, 30), (3, 60)]
    assert (xs(probed), ys(probed)) == ([4], [24])
    low, high = panel.get_ylim()
    assert low < 8
    assert high > 60
    assert legend(run) == ["run", "noise scale", "critical batch"]


def test_absurd_estimates_leave_the_batch_to_be_seen(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(1.0, 1.0).event("probe", norm=1.0, critical_batch=1e12).updates(1.0)
    panel = draw(read([script.save(tmp_path / "run")]), "step").axes[-2]
    assert panel.get_ylim()[1] <= 8 * 16 * 2


@pytest.mark.parametrize("loss", [2.0, 0.0, -3.0, 1e30, None])
def test_a_run_of_one_update_is_a_report(tmp_path: Path, loss: float | None) -> None:
    run = Script().stage(0, 8, 8).updates(loss).save(tmp_path / "run")
    assert [row[3] for row in stages(read([run])[0])] == ["1"]
    assert lines(run, 0)[:1] == ([] if loss is None else [[(1, loss)]])
    draw(read([run]), "sfo").draw_without_rendering()


def test_losses_below_zero_are_on_a_linear_scale_and_widely_spread_ones_on_a_logarithmic_one(tmp_path: Path) -> None:
    spread = Script().stage(0, 8, 8).updates(1.0, 0.0, 0.01).save(tmp_path / "spread")
    narrow = Script().stage(0, 8, 8).updates(1.0, 0.5).save(tmp_path / "narrow")
    negative = Script().stage(0, 8, 8).updates(1.0, 0.01, -1.0).save(tmp_path / "negative")
    scales = [draw(read([run]), "sfo").axes[0].get_yscale() for run in (spread, narrow, negative)]
    assert scales == ["log", "linear", "linear"]


@pytest.mark.parametrize(
    ("rates", "scale"),
    [((0.1, 0.05), "linear"), ((0.1, 0.01, 0.001), "log"), ((0.0, 0.1, 0.001), "log"), ((0.0,), "linear")],
)
def test_learning_rates_that_span_decades_are_on_a_logarithmic_scale(
    tmp_path: Path, rates: tuple[float, ...], scale: str
) -> None:
    script = Script().stage(0, 8, 8).updates(*[1.0] * len(rates))
    for event, rate in zip((event for event in script.events if event["event"] == "step"), rates, strict=True):
        event["lr"] = rate
    figure = draw(read([script.save(tmp_path / "run")]), "sfo")
    figure.draw_without_rendering()
    assert figure.axes[-1].get_yscale() == scale


def test_steps_are_never_labelled_with_fractions(tmp_path: Path) -> None:
    figure = draw(read([Script().stage(0, 8, 8).updates(1.0).save(tmp_path / "run")]), "step")
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()][:2] == ["0", "1"]


# ── smooth and thin ─────────────────────────────────────────────────────────────────────────────────────────────────


def points(values: list[float] | np.ndarray, batch: np.ndarray) -> Curve:
    """A curve whose x do not matter."""
    return Curve(x={}, values=np.array(values), samples=np.cumsum(batch), batch=batch.astype(float))


@pytest.mark.parametrize("count", [1, 2, 3, 500])
def test_smoothing_a_constant_gives_that_constant(count: int) -> None:
    batch = 2.0 ** (np.arange(count) * 10 // count)
    smoothed = smooth(points(np.full(count, 0.3), batch), np.arange(count))
    np.testing.assert_allclose(smoothed, 0.3, rtol=1e-14)


def test_smoothing_is_the_mean_per_sample_over_a_window_of_samples() -> None:
    random = np.random.default_rng(0)
    values, batch = random.normal(size=400), random.integers(1, 50, 400)
    samples, at = np.cumsum(batch), np.array([0, 1, 7, 200, 398, 399])
    reach = 0.1 / 2 * (samples[-1] - samples[0])
    brute: list[float] = []
    for middle in at:
        inside = [i for i in range(400) if abs(samples[i] - samples[middle]) <= reach]
        brute.append(sum(values[i] * batch[i] for i in inside) / sum(batch[i] for i in inside))
    np.testing.assert_allclose(smooth(points(values, batch), at, share=0.1), brute, rtol=1e-12)


def test_a_huge_spike_leaves_nothing_behind_in_later_means() -> None:
    values = np.full(1000, 0.01)
    values[100] = 1e30
    smoothed = smooth(points(values, np.full(1000, 8)), np.arange(500, 1000))
    np.testing.assert_allclose(smoothed, 0.01, rtol=1e-14)


def test_thinning_keeps_ends_extremes_and_both_sides_of_each_change_of_batch() -> None:
    values = np.random.default_rng(0).normal(size=100_003)
    values[777], values[50_001] = -1e3, 1e3
    batch = 2 ** (np.arange(len(values)) // 12_345)
    kept = thin(values, batch)
    changes = [index for index in range(1, len(values)) if batch[index] != batch[index - 1]]
    assert len(changes) == 8
    assert {0, 100_002, 777, 50_001, *changes, *(index - 1 for index in changes)} <= set(kept.tolist())
    assert list(kept) == sorted(set(kept.tolist()))


@pytest.mark.parametrize("count", [0, 1, 2000, 2001, 100_000])
def test_thinning_leaves_few_points_and_all_of_few(count: int) -> None:
    kept = thin(np.random.default_rng(1).normal(size=count), np.arange(count))  # the batch changes with every update
    assert len(kept) == count if count <= 2000 else len(kept) <= 2010


def test_a_curve_skips_events_without_its_key(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(1.0).evaluate(accuracy=0.5).evaluate(other=1.0)
    found = curve(read([script.save(tmp_path / "run")])[0], "eval", "accuracy")
    assert (list(found.values), list(found.batch)) == ([0.5], [1])
