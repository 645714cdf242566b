"""The search for fronts on runs whose losses are known, and runs that are cut off."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from front_bars import bars
from front_runs import AUTO, DECAYS, Outcome, Runs, Wanted
from front_search import DECAY, GROWTH, Front, Search, families, kinds
from front_tables import comparison, fronts_table, rates
from front_tasks import FrontTask, digits, quick

from distgrow.config.run import Run


class Known(Runs):
    """Runs that are not made: growth comes to the decay's loss at the same b₀ and η, in a share of its steps."""

    def __init__(self, task: FrontTask, folder: Path, share: float, drawback: float = 0.0) -> None:
        super().__init__(task, folder)
        self.share, self.drawback, self.asked = share, drawback, list[Wanted]()

    @staticmethod
    def best(batch: int) -> int:
        """Return the exponent of the best η: it rises with the batch up to a limit."""
        return min(1, int(math.log2(batch)) - 5)

    def get(self, wanted: Wanted) -> Outcome:
        """Return a loss that doubles its distance from 1 with each doubling of the batch."""
        self.asked.append(wanted)
        grown = wanted.schedule not in DECAYS
        off = 0.02 * abs(wanted.exponent - self.best(wanted.batch)) + 0.001 * (wanted.seed - 1)
        loss = 1 + 0.01 * math.log2(wanted.batch) + off + grown * self.drawback
        diverged = wanted.exponent > self.best(wanted.batch) + 2
        metrics: Mapping[str, float] = {} if diverged else {"loss": loss, "average/loss": loss + 0.5}
        steps = round(4096 / wanted.batch * (self.share if grown else 1))
        return Outcome(
            **{name: getattr(wanted, name) for name in ("schedule", "batch", "exponent", "seed")},
            key=str(wanted), folder="", updates=steps, evaluations=4096, metrics=metrics, refused="", seconds=0.0,
            hardware="", made="",
        )  # fmt: skip


def searched(tmp_path: Path, **known: float) -> Search:
    """Return a search that has settled."""
    task = replace(digits(), samples=4096)
    search = Search(task, Known(task, tmp_path, **known))
    search.all()
    search.settle()
    return search


def named(fronts: list[Front], name: str) -> Front:
    """Return the front with a name."""
    return next(each for each in fronts if each.name == name)


def test_fronts_consist_of_the_best_rates_with_all_seeds(tmp_path: Path) -> None:
    search = searched(tmp_path, share=0.5)
    points = search.settle()
    assert {(point.batch, point.exponent) for point in points} == {
        (batch, Known.best(batch)) for batch in search.task.batches
    }
    for family in families(points):
        assert all(sorted(point.runs) == [0, 1, 2] for point in family.best())
    for name, least, share in ((DECAY, 1024, 1), (GROWTH, 256, 0.5)):
        line = named(families(points), name).line()
        places = [(share * 4096 / b, 1 + 0.01 * math.log2(b)) for b in (least, 4)]
        assert [line[0], line[-1]] == [pytest.approx(place) for place in places]


def test_a_search_that_has_settled_asks_for_no_other_runs(tmp_path: Path) -> None:
    search = searched(tmp_path, share=0.5)
    runs = search.runs
    assert isinstance(runs, Known)
    before = set(runs.asked)
    again = Search(search.task, runs)
    again.all()
    again.settle()
    assert set(runs.asked) == before


def test_pairs_have_one_batch_and_the_decays_rate(tmp_path: Path) -> None:
    search = searched(tmp_path, share=0.5)
    pairs = search.pairs()
    assert {pair.batch for pair in pairs} == set(search.task.starts)
    for pair in pairs:
        assert {run.exponent for run in [*pair.grown.values(), *pair.decayed.values()]} == {Known.best(pair.batch)}
        assert (pair.above(), pair.steps) == (0.0, 0.5)


def verdicts(search: Search) -> list[str]:
    """Return what the bars come to."""
    return [row[-1] for row in bars(search.settle(), search.pairs()).rows]


@pytest.mark.parametrize(
    ("share", "drawback", "expected"),
    [
        (0.5, 0.0, ["met", "met", "met", "met", "met", "met", "missed"]),  # as low as the smallest batch, not lower
        (0.5, -0.001, ["met", "met", "met", "met", "met", "met", "met"]),
        (0.625, 0.0, ["met", "missed", "met", "missed", "met", "missed", "missed"]),
        (0.5, 0.05, ["missed", "missed", "missed", "missed", "missed", "missed", "missed"]),
    ],
)
def test_bars_are_met_just_if_the_known_fronts_meet_them(
    tmp_path: Path, share: float, drawback: float, expected: list[str]
) -> None:
    assert verdicts(searched(tmp_path, share=share, drawback=drawback)) == expected


def test_tables_show_the_known_ratios_and_mark_ends_of_the_grid(tmp_path: Path) -> None:
    search = searched(tmp_path, share=0.5)
    points = search.settle()
    rows = {row[0]: row for row in comparison(search.task, points).rows}
    assert rows[GROWTH][-3:] == ["0.50 (0.50 … 0.50)"] * 3
    assert rows[f"`{AUTO}`"][2].startswith("-0.")
    shown = [row for row in fronts_table(search.task, points).rows if row[0] == DECAY]
    assert [row[-2] for row in shown if "end" in row[-2]] == ["1024 (the grid's end)", "4 (the grid's end)"]
    narrow = Search(replace(search.task, highest=0), search.runs)
    assert {row[0]: row[-1] for row in rates(search.task, narrow.all()).rows}["`constant`"].startswith("≥ 2^0")
    assert {front.name for front in kinds(points)} >= {*DECAYS, AUTO, f"{AUTO} + average"}


class Cut:
    """A tracker that ends the process at an update."""

    def log(self, event: Any) -> None:
        """Raise at the eighth update."""
        if event["event"] == "step" and event["step"] >= 8:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Do nothing."""


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, wanted = quick(digits()), Wanted(schedule="linear-decay", batch=32, exponent=-3, seed=1)
    whole = Runs(task, tmp_path / "whole").get(wanted)
    fit = Run.fit
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "fit", lambda run, **how: fit(run, trackers=[Cut()], **how))
        Runs(task, tmp_path / "cut").get(wanted)
    again = Runs(task, tmp_path / "cut")
    outcome = again.get(wanted)
    assert again.made == 1
    assert (outcome.metrics, outcome.updates) == (whole.metrics, whole.updates)
    assert outcome.evaluations >= whole.evaluations
    assert Runs(task, tmp_path / "cut").get(wanted) == outcome
