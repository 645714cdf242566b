"""The critical batch that is read off runs at several batches: of runs whose K(b) is known, and of what are none."""

from pathlib import Path

import pytest
from scripted import Script

from distgrow.core.errors import ConfigError
from distgrow.critical_batch.sweep import fit_batch


def run(folder: Path, batch: int, updates: float, *, every: int = 1, metric: str = "loss", end: int = 400) -> str:
    """A run at one batch whose metric falls along a line from 2 to 1 at so many updates, and on."""
    script = Script().event("start").stage(0, batch, batch)
    for step in range(1, end + 1):
        script.updates(1.0)
        if step % every == 0:
            script.evaluate(**{metric: 2 - step / updates})
    return script.end().save(folder)


def steps(batch: float, a: float, b: float) -> float:
    """K(b) = Ab/(b − B), with ε − C as the unit."""
    return a * batch / (batch - b)


@pytest.mark.parametrize("every", [1, 7])
def test_runs_whose_updates_follow_the_bound_give_its_critical_batch(every: int, tmp_path: Path) -> None:
    """Whatever the interval of evaluations: the metric falls along a line, on which the arrival is interpolated."""
    a, b = 100.0, 5.0
    runs = [run(tmp_path / f"b{n}", n, steps(n, a, b), every=every) for n in (8, 12, 16, 32, 64)]
    fit = fit_batch(runs, "loss", 1.0, tmp_path / "out")
    assert fit.critical_batch(1.0) == pytest.approx(2 * b, rel=1e-6)
    assert fit.critical_steps(1.0) == pytest.approx(2 * a, rel=1e-6)
    assert (tmp_path / "out/fit-batch-loss-1.png").stat().st_size > 10_000


def test_a_run_that_never_arrives_is_shown_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run(tmp_path / f"b{n}", n, steps(n, 100.0, 5.0)) for n in (8, 16, 64)]
    slow = run(tmp_path / "b128", 128, 1000.0)
    assert fit_batch([*runs, slow], "loss", 1.0).critical_batch(1.0) == pytest.approx(10.0, rel=1e-6)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("b128")]
    assert row.split()[2] == "—"


def test_a_folder_for_the_figure_that_cannot_be_made_is_refused_by_its_option(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"b{n}", n, steps(n, 100.0, 5.0)) for n in (8, 16, 64)]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out=.*/file/out: Not a directory; choose a --out [^.]*$"):
        fit_batch(runs, "loss", 1.0, tmp_path / "file/out")


def test_a_critical_batch_beyond_the_runs_is_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit_batch([run(tmp_path / f"b{n}", n, steps(n, 100.0, 5.0)) for n in (16, 64)], "loss", 1.0)
    assert "outside of the batches" in capsys.readouterr().out


def test_runs_that_show_no_critical_batch_are_refused_with_what_each_took(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", 8, 50.0), run(tmp_path / "b", 16, 50.0)]
    with pytest.raises(ConfigError, match=r"--target=1: .*batch 8: 50 updates, batch 16: 50 updates"):
        fit_batch(runs, "loss", 1.0)
    with pytest.raises(ConfigError, match=r"batch 8: never came there"):
        fit_batch(runs, "loss", -100.0)


def test_a_run_that_grew_and_a_metric_that_is_not_there_are_refused_by_name(tmp_path: Path) -> None:
    fine = run(tmp_path / "fine", 8, 50.0)
    grown = Script().event("start").stage(0, 8, 8).updates(1.0).stage(1, 16, 16).updates(1.0).evaluate(loss=0.5)
    with pytest.raises(ConfigError, match=r"grown had the batches 8, 16: give runs that keep one batch"):
        fit_batch([fine, grown.save(tmp_path / "grown")], "loss", 1.0)
    with pytest.raises(ConfigError, match=r"--metric=f1: fine has not evaluated it; it has loss"):
        fit_batch([fine], "f1", 1.0)
