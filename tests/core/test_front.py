"""Fronts of (steps, loss): hulls and ratios against brute force and closed forms, the search for η, and resuming."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import front
import front_runs
import pytest
import torch
from front_hull import Place, above, bracket, hull, interval, loss_at, mean_above, resamples, steps_ratio, steps_to
from front_hull import front as line_of
from front_runs import DECAYS, Wanted, config, schedules
from front_sets import PENALTY, digits_minimum, digits_objective
from front_tasks import FrontTask, digits, quick
from sfo_runs import full_gradient

from distgrow.config.load import parse
from distgrow.core.errors import ConfigError


def scattered(seed: int, count: int = 12) -> list[Place]:
    """Return points whose losses fall with steps, roughly."""
    random = torch.Generator().manual_seed(seed)
    logs, noise = torch.rand(count, generator=random) * 8, torch.rand(count, generator=random)
    return [(float(2**x), float(3 - 0.2 * x + y)) for x, y in zip(logs, noise, strict=True)]


def between(one: Place, other: Place, steps: float) -> float:
    """Return the loss on the segment between two points."""
    x, y = math.log2(one[0]), math.log2(other[0])
    return one[1] + (math.log2(steps) - x) / (y - x) * (other[1] - one[1])


def least(places: list[Place], steps: float) -> float:
    """Return the lowest loss that points with at most so many steps, or segments over them, have: by brute force."""
    known = [loss for own, loss in places if own <= steps]
    for one, other in combinations(sorted(places), 2):
        if one[0] < steps < other[0]:
            known.append(between(one, other, steps))
    return min(known)


@pytest.mark.parametrize("seed", range(20))
def test_a_point_is_on_the_front_just_if_no_point_or_segment_is_as_good(seed: int) -> None:
    places = scattered(seed)
    expected = []
    for index, place in enumerate(places):
        rest = [other for other in places if other is not place]
        if all(own > place[0] for own, _ in rest) or least(rest, place[0]) > place[1]:
            expected.append(index)
    assert sorted(hull(places)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_between_its_points_a_front_is_the_lowest_segment_and_behind_them_it_is_flat(seed: int) -> None:
    places = scattered(seed)
    line = line_of(places)
    for steps in (line[0][0], *(2**x for x in (0.5, 2.2, 4.7, 9.0, 12.0))):
        if steps >= line[0][0]:
            assert loss_at(line, steps) == pytest.approx(least(places, steps))
        else:
            assert loss_at(line, steps) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_steps_to_a_loss_invert_the_loss_at_steps(seed: int) -> None:
    line = line_of(scattered(seed))
    for part in (0.0, 0.3, 0.7, 1.0):
        steps = line[0][0] ** (1 - part) * line[-1][0] ** part
        loss = loss_at(line, steps)
        assert loss is not None
        assert steps_to(line, loss) == pytest.approx(steps)


def test_points_that_diverged_or_are_equal_are_no_corners() -> None:
    assert hull([(4, 2.0), (8, math.inf), (16, 1.0), (8, math.nan)]) == [0, 2]
    assert hull([(4, 2.0), (4, 2.0), (4, 3.0), (8, 2.0)]) == [0]
    assert hull([(4, 3.0), (8, 2.0), (16, 1.0)]) in ([0, 2], [0, 1, 2])
    assert hull([]) == []


def straight(first: int, last: int, *, factor: float = 1.0, steps: float = 1.0) -> list[Place]:
    """Return factor × (10 − log₂ n) at n·steps, n from 2^first to 2^last."""
    return [(steps * 2.0**k, factor * (10 - k)) for k in range(first, last + 1, 2)]


def test_ratios_of_fronts_that_are_known_are_exact() -> None:
    base = straight(2, 8)
    assert mean_above(straight(2, 8, factor=1.02), base) == pytest.approx(0.02)
    assert above(straight(2, 8, factor=1.02), base) == pytest.approx(0.02)
    half = straight(2, 8, steps=0.5)
    assert steps_ratio(half, base, half[0][1]) == pytest.approx(0.5)
    assert steps_ratio(half, base, 5.3) == pytest.approx(0.5)
    for part, steps in ((0.0, 4.0), (0.5, 32.0)):  # both have from 2² steps on
        assert above(half, base, part) == pytest.approx((9 - math.log2(steps)) / (10 - math.log2(steps)) - 1)
    assert above(half, base) == pytest.approx(0.0)  # at 2⁸ both have come to their last loss
    assert above(base, half) == pytest.approx(max((10 - k) / (9 - k) - 1 for k in range(2, 8)))


def test_beyond_the_grid_nothing_is_told() -> None:
    base, low = straight(2, 6), straight(4, 8)
    assert steps_to(base, low[-1][1]) is None
    assert steps_ratio(low, base, low[-1][1]) is None
    assert steps_to(base, 9.5) == base[0][0]
    assert above([], base) is None
    assert above(low, base) == pytest.approx(0.0)
    assert loss_at(low, 8) is None


def test_the_bootstrap_makes_every_draw_of_three_once_and_its_interval_leaves_out_equal_parts() -> None:
    draws = resamples([0, 1, 2])
    assert len(draws) == len(set(draws)) == 27
    means = [sum(draw) / 3 for draw in draws]
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, (20_000, 3), generator=random).double().mean(1)
    low, high = (drawn.quantile(q).item() for q in (0.05, 0.95))
    assert interval(means) == pytest.approx((low, high))
    many = [sum(draw) / 6 for draw in resamples(range(6))]
    assert sum(many) / len(many) == pytest.approx(2.5, abs=4 * math.sqrt(35 / 12 / 6 / len(many)))
    assert interval([1.0, None]) is None
    assert interval([2.0]) == (2.0, 2.0)


# ── the search for η ────────────────────────────────────────────────────────────────────────────────────────────


def counted(curve: Callable[[int], float]) -> tuple[Callable[[int], float], list[int]]:
    """Return a curve that keeps where it was asked."""
    asked: list[int] = []

    def loss(exponent: int) -> float:
        asked.append(exponent)
        return curve(exponent)

    return loss, asked


@pytest.mark.parametrize("start", range(-8, 5))
@pytest.mark.parametrize("best", range(-7, 4))
def test_the_bracket_finds_the_minimum_from_anywhere_and_asks_no_place_twice(start: int, best: int) -> None:
    loss, asked = counted(lambda k: (k - best) ** 2 if k <= best + 2 else math.inf)
    found = bracket(loss, start, -8, 4)
    assert (found.best, found.open) == (best, "")
    assert len(asked) == len(set(asked)) <= abs(start - best) + 3


def test_a_minimum_at_the_end_of_the_grid_is_marked() -> None:
    assert bracket(lambda k: -k, 0, -3, 2).open == "high"
    assert bracket(lambda k: k, 0, -3, 2).open == "low"
    assert bracket(lambda k: math.inf, 0, -3, 2).open == "low"
    assert bracket(lambda k: math.inf if k > -3 else 1.0, 1, -3, 2).best == -3


def test_on_a_plateau_the_search_stays() -> None:
    loss, asked = counted(lambda k: 1.0)
    assert bracket(loss, 0, -8, 8).best == 0
    assert sorted(asked) == [-1, 0, 1]


# ── tasks and runs ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_least_objective_lies_where_strong_convexity_has_it() -> None:
    """f − ‖∇f‖²/(2μ) ≤ f* ≤ f for a μ-strongly convex f; the metric `loss` is that f."""
    task = digits_objective()
    parameters = list(task.model.parameters())
    for _ in range(300):
        gradient, mean = full_gradient(task, PENALTY, 2048)
        with torch.no_grad():
            for parameter, part in zip(parameters, gradient, strict=True):
                parameter -= part
    gradient, mean = full_gradient(task, PENALTY, 2048)
    objective = mean + PENALTY / 2 * sum(p.double().square().sum().item() for p in parameters)
    slack = sum(part.double().square().sum().item() for part in gradient) / (2 * PENALTY)
    assert objective - slack <= digits_minimum() <= objective
    rows = torch.arange(len(task.test)).numpy()
    assert task.metrics is not None
    assert task.metrics(task.model, task.test.batch(rows, rows))["loss"].item() == pytest.approx(objective, rel=1e-5)


def test_every_schedule_of_the_grid_can_run_and_none_begins_elsewhere_than_it_says() -> None:
    task = digits()
    for batch in (4, 64, 1024):
        names = list(schedules(task, batch, 0.25))
        assert set(DECAYS) <= set(names)
        assert (batch in task.starts) == ("matched" in names) == ("auto" in names)
        for name in names:
            run = parse(config(task, Wanted(schedule=name, batch=batch, exponent=-2, seed=1)))
            assert (run.growth.start, run.lr.base, run.run.seed) == (batch, 0.25, 1)
            assert run.budget.samples == task.samples


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """One schedule of a kind, and little of it."""

    def few(path: str, **sizes: object) -> list[object]:
        return [quick(digits())]

    monkeypatch.setattr(front, "tasks", few)
    monkeypatch.setattr("sys.argv", ["front.py", "--quick", "--schedules", "linear-decay", "matched", "--results",
                                     str(tmp_path), "--readme", str(tmp_path / "README.md")])  # fmt: skip
    yield tmp_path
    torch.set_num_threads(1)


def test_a_second_call_makes_no_run_and_the_same_tables(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = alone / "digits" / "results.jsonl", alone / "README.md"
    front.main()
    first, written = capsys.readouterr(), readme.read_text()
    lines = results.read_text().splitlines(keepends=True)
    assert f"{len(lines)} runs made, 0 found" in first.err
    assert "<!-- front-digits: generated -->" in written
    assert (alone / "plots" / "front-digits.png").exists()
    for line in map(json.loads, lines):
        folder = results.parent / line["folder"]
        assert (folder / "config.yaml").exists()
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["sfo"] == line["evaluations"]
        assert not (folder / "checkpoints").exists()
    front.main()
    second = capsys.readouterr()
    assert f"0 runs made, {len(lines)} found" in second.err
    assert (second.out, readme.read_text()) == (first.out, written)
    results.write_text("".join(lines)[:-20])  # a kill has torn the last line
    front.main()
    assert f"1 runs made, {len(lines) - 1} found" in capsys.readouterr().err
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(one["key"], one["metrics"]) for one in again] == [
        (one["key"], one["metrics"]) for one in map(json.loads, lines)
    ]


def served_by(made: list[FrontTask]) -> Callable[..., list[FrontTask]]:
    """Return what stands in for the list of tasks."""

    def listed(path: str, **sizes: object) -> list[FrontTask]:
        return made

    return listed


def test_a_task_whose_data_is_missing_is_said_and_left_out_until_the_data_is_there(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = quick(digits())
    missing = replace(whole, base={**whole.base, "task": {"kind": "cifar10", "path": str(alone / "none")}})
    served = [missing]
    monkeypatch.setattr(front, "tasks", served_by(served))
    front.main()
    told = capsys.readouterr()
    assert "no run could be made" in told.err
    assert told.out == ""

    def refused(values: object) -> None:
        raise ConfigError("task.path=none: nothing there")

    served[0] = whole
    with monkeypatch.context() as without:
        without.setattr(front_runs, "trained", refused)
        front.main()
    assert "no run could be made" in capsys.readouterr().err
    front.main()  # the same runs; nothing refuses them now
    assert "Fronts" in capsys.readouterr().out


def test_growth_that_would_begin_at_its_cap_or_above_is_refused_and_below_it_runs() -> None:
    task = digits()
    below = front.narrowed(task, front.parser().parse_args(["--starts", "3", str(task.cap - 1)]))
    assert all("matched" in schedules(below, start, 1.0) for start in below.starts)
    for start in (task.cap, 4 * task.cap):
        with pytest.raises(ConfigError, match=rf"--starts {start}: growth of digits ends at {task.cap}"):
            front.narrowed(task, front.parser().parse_args(["--starts", "4", str(start)]))
