"""What `what-if` predicts against what came of it: `python benchmarks/what_if.py [--from FOLDER]`.

Every run of a folder predicts the ends of all other schedules of the same task, optimizer, η₀, budget and seed; of the
first seed, every second pair of runs does so, too. The SHA-256 of their names puts schedules into two halves. The law
was tuned on the first half alone; runs predict only what is in their own half. Beside it stand the loss of the run
itself, and a fit of L∞ + A·T^−s without noise. By default it makes its own runs and keeps them in runs/what-if.
--from takes the folder that `benchmarks/front.py` leaves, too: there a schedule and its first batch are one schedule.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paired import Report, arguments, keep, show, tell
from scipy.optimize import least_squares
from what_if_halves import halves, spearman
from what_if_runs import ended, make_all, make_few

from distgrow.core.errors import ConfigError, RunError
from distgrow.core.yaml_text import plain, read_text
from distgrow.planning.what_if.fit import Fit, fit, told
from distgrow.planning.what_if.observed import Observed, observed
from distgrow.report.runs import Record, read

Array = NDArray[np.float64]
HERE = Path(__file__).parent
LAST = 0.95  #: of the samples: evaluations after it are the end of a run
LOSSES = {"training loss": None, "loss of the whole training set": "train/loss", "held-out loss": "test/loss"}
BAR, RANK = 0.01, 0.9
BASES = ("own loss", "no noise")
METHODS = (*BASES, "one run", "two runs")
FRONT = re.compile(r"(b\d+)-lr.+-s\d+-[0-9a-f]+")  #: the folders of runs of front.py
FEWEST = 3  #: schedules that are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Hold what a run shows of one loss."""

    group: str  #: what all runs have in common that predict one another
    task: str
    schedule: str
    seed: int
    momentum: float | None  #: None: not SGD
    seen: Observed

    @property
    def last(self) -> NDArray[np.bool_]:
        """Return which of the losses are the end: the mean of the last epoch, or the last evaluations or lines."""
        newest = np.arange(len(self.seen.losses)) == len(self.seen.losses) - 1
        late = self.seen.over @ self.seen.course.samples > LAST * self.seen.course.samples[-1]
        return newest if self.seen.epochs or not late.any() else late

    @property
    def end(self) -> float:
        """Return the loss at the end."""
        return float(self.seen.losses[self.last].mean())

    @property
    def error(self) -> float:
        """Return the standard error of `end`."""
        return float(np.sqrt(np.mean(self.seen.errors[self.last] ** 2) / np.sum(self.last)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Hold how one method, from one run or pair, predicts the others of its half."""

    task: str
    loss: str
    half: int
    method: str
    errors: Sequence[float]  #: predicted / real − 1
    rank: float | None
    inside: Sequence[bool]  #: the intervals of 90 % that hold the real end, give or take its own error


def cases(folder: Path, metric: str | None) -> Iterator[Case]:
    """Yield the runs of a folder that have ended and show enough, with one of their losses."""
    left_out = list[str]()
    for file in sorted(folder.rglob("metrics.jsonl")):
        if not ended(file.parent):
            continue
        (record,) = read([str(file.parent)])
        if metric is not None and metric not in record.metrics:
            continue
        try:
            yield case(folder, file.parent, record, metric)
        except (ConfigError, RunError) as error:
            left_out.append(str(error))
    if left_out:
        tell(f"left out: {len(left_out)} of the runs, such as: {left_out[0]}")


def named(root: Path, folder: Path) -> tuple[str, str]:
    """Return task and schedule of a run: its folder is root/TASK/SCHEDULE[/SEED], or one of front.py.

    Raises:
        ConfigError: It lies elsewhere.
    """
    if front := FRONT.fullmatch(folder.name):
        return folder.parent.parent.name, f"{folder.parent.name} {front[1]}"
    parts = folder.relative_to(root).parts
    if not parts:
        raise ConfigError(f"--from={root} is a run itself: give the folder of TASK/SCHEDULE[/SEED]")
    task, *names = parts
    return task, "/".join([name for name in names if not name.isdigit()] or [task])


def case(root: Path, folder: Path, record: Record, metric: str | None) -> Case:
    """Return a run, with task and schedule by its folder."""
    values: Any = plain(read_text(record.config, "config.yaml"))
    task, schedule = named(root, folder)
    optimizer, seed = values.get("optimizer") or {}, values["run"]["seed"]
    common = [optimizer, values["lr"]["base"], values.get("model"), values.get("task"), record.ledger.applied]
    return Case(
        group=json.dumps([task, *common, seed], sort_keys=True),
        task=task,
        schedule=schedule,
        seed=seed,
        momentum=optimizer.get("momentum", 0.0) if optimizer.get("kind", "sgd") == "sgd" else None,
        seen=observed(record, metric),
    )


def score(loss: str, half: int, method: str, given: Sequence[Case], others: Sequence[Case]) -> Score:
    """Predict the ends of `others` from one or two runs."""
    inside, law = list[bool](), fit([run.seen for run in given], given[0].momentum) if method not in BASES else None
    if law is not None:
        predicted = [float(told(law.law, other.seen)[other.last].mean()) for other in others]
        inside = [holds(law, other, loss) for other, loss in zip(others, predicted, strict=True)]
    elif method == "own loss":
        predicted = [given[0].end] * len(others)
    else:
        predicted = quiet(given[0], others)
    real = [other.end for other in others]
    errors = [loss / end - 1 for loss, end in zip(predicted, real, strict=True)]
    rank = None if method == "own loss" or len(real) < 3 else spearman(predicted, real)
    return Score(task=given[0].task, loss=loss, half=half, method=method, errors=errors, rank=rank, inside=inside)


def holds(law: Fit, other: Case, loss: float) -> bool:
    """Return whether the interval, moved to where `loss` is predicted, holds the real end."""
    last, low, high = law.predict(other.seen.course)
    return low - 1.645 * other.error <= other.end + last - loss <= high + 1.645 * other.error


def quiet(given: Case, others: Sequence[Case]) -> list[float]:
    """Predict by L∞ + A·T^−s, fitted with the same beliefs about these three."""
    seen = given.seen
    least, last = float(seen.losses.min()), seen.course.times[-1]
    means, errors = np.log([0.2 * least, 0.3 * least, 0.6]), np.array([1.5, 1.5, 0.6])
    own = np.hypot(seen.errors, 0.003 * seen.losses)

    def losses(numbers: Array, run: Observed) -> Array:
        floor, fall, power = np.exp(numbers)
        return run.over @ (floor + fall * (run.course.times / last) ** -power)

    def residuals(numbers: Array) -> Array:
        return np.concatenate([(losses(numbers, seen) - seen.losses) / own, (numbers - means) / errors])

    begins = [means + np.array([0, 0, power]) for power in (-0.6, 0.0, 0.6)]
    found = min((least_squares(residuals, begin) for begin in begins), key=lambda each: each.cost)
    return [float(losses(found.x, other.seen)[other.last].mean()) for other in others]


def jobs(loss: str, found: Sequence[Case]) -> Iterator[tuple[str, int, str, list[Case], list[Case]]]:
    """Yield what is to be predicted from what: the arguments of `score`."""
    tasks = defaultdict[str, set[str]](set)
    for run in found:
        tasks[run.task].add(run.schedule)
    parts = {task: halves(names) for task, names in tasks.items()}
    groups = defaultdict[tuple[str, int], list[Case]](list)
    for run in found:
        half = next(k for k, names in enumerate(parts[run.task]) if run.schedule in names)
        groups[run.group, half].append(run)
    for (_, half), runs in groups.items():
        if len({run.schedule for run in runs}) < FEWEST:
            continue
        first = min(run.seed for run in found if run.task == runs[0].task)
        for method in METHODS if runs[0].seed == first else METHODS[:-1]:
            size = 2 if method == "two runs" else 1
            for numbers in combinations(range(len(runs)), size):
                given = [runs[k] for k in numbers]
                others = [run for run in runs if run.schedule not in {each.schedule for each in given}]
                if others and (size == 1 or sum(numbers) % 2 == 0):
                    yield loss, half, method, given, others


def accuracy(loss: str, scores: Sequence[Score]) -> Report:
    """Return the table of one loss: a row for each task and half."""
    rows = list[list[str]]()
    for task in dict.fromkeys(score.task for score in scores):
        for half, name in enumerate(("tuned", "held back")):
            cells = [task, name]
            for method in METHODS:
                own = [each for each in scores if (each.task, each.half, each.method) == (task, half, method)]
                cells.append(cell(own) if own else "–")
            rows.append(cells)
    title = f"{loss}: median error, rank correlation, intervals of 90 % that hold (target: ≤ 1 %, ≥ .9)"
    return Report(title=title, columns=["task", "half", *METHODS], rows=rows)


def cell(scores: Sequence[Score]) -> str:
    """Return how well a method did."""
    error = float(np.median(np.abs([error for score in scores for error in score.errors])))
    told, ranks = [f"{error:.1%}".replace("%", " %")], [score.rank for score in scores if score.rank is not None]
    if ranks:
        told.append(f"{np.mean(ranks):.2f}")
    if held := [inside for score in scores for inside in score.inside]:
        told.append(f"{np.mean(held):.0%}".replace("%", " %"))
        told.append("met" if error <= BAR and ranks and np.mean(ranks) >= RANK else "missed")
    return ", ".join(told)


def limits(loss: str, found: Sequence[Case]) -> Iterator[list[str]]:
    """Yield, for each task, what no prediction can know of the ends."""
    for task in dict.fromkeys(run.task for run in found):
        runs = [run for run in found if run.task == task]
        seeds = sorted({run.seed for run in runs})
        ends = {(run.schedule, run.seed): run.end for run in runs}
        names = [name for name in {run.schedule for run in runs} if all((name, seed) in ends for seed in seeds)]
        errors = float(np.median([run.error / run.end for run in runs]))
        row = [task, loss, f"{min(ends.values()):.3g} – {max(ends.values()):.3g}", percent(errors)]
        if len(seeds) > 1 and len(names) > 2:
            one, other = (np.array([ends[name, seed] for name in names]) for seed in seeds[:2])
            gaps = np.log(one / other)
            spread, own = np.median(np.abs(gaps)), np.median(np.abs(gaps - np.median(gaps)))
            row += [percent(float(spread)), percent(float(own)), f"{spearman(one, other):.2f}"]
        yield [*row, *["–"] * (7 - len(row))]


def percent(share: float) -> str:
    """Return a share as text."""
    return f"{100 * share:.2g} %"


def reports(found: Mapping[str, Sequence[Case]], scores: Sequence[Score]) -> list[Report]:
    """Return a table for each loss, and one of what cannot be predicted."""
    columns = ["task", "loss", "ends", "error of an end", "between seeds", "without what all share", "rank correlation"]
    rows = [row for loss, runs in found.items() for row in limits(loss, runs)]
    spread = Report(title="What cannot be predicted: the same schedule with another seed", columns=columns, rows=rows)
    return [*(accuracy(loss, [each for each in scores if each.loss == loss]) for loss in found), spread]


def options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--from", type=Path, dest="folder", help="runs that are there: FOLDER/TASK/SCHEDULE[/SEED], or of front.py"
    )
    return parser.parse_args()


def main() -> None:
    """Make the runs, predict, keep, show."""
    given = options()
    folder = given.folder or HERE.parent / "runs" / ("what-if-quick" if given.quick else "what-if")
    if given.folder is None:
        (make_few if given.quick else make_all)(folder)
    found = {loss: list(cases(folder, metric)) for loss, metric in list(LOSSES.items())[: 1 if given.quick else None]}
    found = {loss: runs for loss, runs in found.items() if runs}
    wanted = [job for loss, runs in found.items() for job in jobs(loss, runs)]
    if not wanted:
        raise SystemExit(
            f"{folder}: no {FEWEST} schedules in one half have runs of one task, optimizer, η₀, budget and seed that "
            "have ended and show enough; give --from=FOLDER with FOLDER/TASK/SCHEDULE[/SEED], or what front.py has left"
        )
    tell(f"{len(wanted)} fits")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        scores = list(pool.map(score, *zip(*wanted, strict=True), chunksize=4))
    if given.jsonl:
        keep(given.jsonl, scores)
    show(reports(found, scores), markdown=given.markdown)


if __name__ == "__main__":
    main()
