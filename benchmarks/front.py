"""The front of growth: at one budget of gradient evaluations, the least loss for each number of serial steps.

    python benchmarks/front.py [--task NAME …] [--quick | --gpu] [--budget N] …

Tuned decay at every constant batch stands against growth that does not measure, from every b₀, and both with an average
of the parameters. η is bracketed on powers of two for each; what lies on a front runs with more seeds. Every run is a
line of RESULTS/TASK/results.jsonl and keeps its folder beside it; what is there is not run again, so a later call goes
on. benchmarks/fronts has the lines of fronts that take hours: --results benchmarks/fronts goes on with them. --readme
puts tables and plots into benchmarks/README.md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from front_bars import bars
from front_runs import Outcome, Runs
from front_search import Point, Search
from front_sets import source_files
from front_tables import comparison, fronts_table, plot, rates
from front_tasks import IMAGES, FrontTask, tasks
from paired import Report, show, tell
from sfo_readme import section, write
from sfo_sizes import README, positive

from distgrow.core.errors import ConfigError

LEGEND = (
    "A front is the lower left hull of (log₂ steps, loss). *loss above*: of a front's loss over that of tuned decay "
    "at equal steps, the mean over log steps and the most. *steps ÷*: steps over those of tuned decay to the same "
    "loss, at the front's fewest steps, at the loss half-way between what both have, and at its least loss; *≥*: "
    "tuned decay's largest batch ends lower already, so one beyond its grid may need fewer steps. In brackets: 90 % "
    "of the bootstrap over seeds (of three all draws, of more 200), each draw with its own fronts through the same "
    "points. The most of several values rises with their noise, so that its interval can lie above it. η is a power "
    "of two; *≤* or *≥* marks one at the end of its grid."
)


def measured(task: FrontTask, folder: Path) -> tuple[Search, list[Point], list[Report]]:
    """Make what runs are missing, and the tables."""
    search = Search(task, Runs(task, folder))
    search.all()
    points = search.settle()
    pairs = search.pairs()
    for where, reason in search.refused.items():
        tell(f"{task.name}: {where}: {reason}")
    if not points:
        return search, points, []
    reports = [fronts_table(task, points), comparison(task, points), bars(points, pairs), rates(task, points)]
    return search, points, reports


def lead(task: FrontTask, search: Search, command: str) -> str:
    """Return what tables come from, in words."""
    runs = search.runs.used
    machines = "; ".join(sorted({run.hardware for run in runs}))
    made = "; ".join(sorted({run.made for run in runs}))
    spent, hours = sum(run.evaluations for run in runs), sum(run.seconds for run in runs) / 3600
    average = "the average is an EMA over 5 % of the budget"
    return (
        f"`{command}` · {machines} · {made}\n\n{task.about}. The loss is {task.loss}. {len(runs):,} runs of "
        f"{task.samples:,} gradient evaluations (epochs: {task.samples / task.epoch:.3g}), {spent:,} in all, "
        f"{hours:.1f} h; {len(diverged(runs))} diverged; seeds: {task.seeds}; growth has a cap of 16·b₀, at most "
        f"{task.cap:,}; {average}."
        f"\n\n{LEGEND}"
    )


def diverged(runs: Sequence[Outcome]) -> list[Outcome]:
    """Return the runs that ended without a loss."""
    return [run for run in runs if not run.metrics and not run.refused]


def publish(task: FrontTask, words: str, points: list[Point], reports: list[Report], readme: Path, kind: str) -> None:
    """Put a task's tables into a Markdown file, its plot beside that; `kind` ends the section's name."""
    name = f"front-{task.name}{f'-{kind}' if kind else ''}"
    title = task.title + (f" ({kind})" if kind else "")
    file = readme.parent / "plots" / f"{name}.png"
    plot(task, points, file)
    images = [(f"{title}: loss against serial steps", str(file.relative_to(readme.parent)))]
    write(readme, name, section(title, words, reports, images))


def command(task: FrontTask, options: argparse.Namespace) -> str:
    """Return what runs a task again as it was asked for."""
    flags = "".join(f" --{name}" for name in ("quick", "gpu") if getattr(options, name))
    for name in ("budget", "shape", "seeds", "batches", "starts", "schedules", "results", "kind"):
        given = getattr(options, name)
        if given:
            flags += f" --{name} {' '.join(map(str, given)) if isinstance(given, list) else given}"
    return f"python benchmarks/front.py --task {task.name}{flags}"


def chosen(options: argparse.Namespace) -> list[FrontTask]:
    """Return the tasks that are asked for.

    Raises:
        ConfigError: A name is none of theirs.
    """
    made = tasks(options.data, gpu=options.gpu, small=options.quick, budget=options.budget, shape=options.shape)
    known = {task.name: task for task in made}
    if unknown := set(options.task) - set(known):
        raise ConfigError(f"--task {' '.join(sorted(unknown))}: choose from {', '.join(known)}")
    return [narrowed(task, options) for name, task in known.items() if not options.task or name in options.task]


def narrowed(task: FrontTask, options: argparse.Namespace) -> FrontTask:
    """Return a task with what options change.

    Raises:
        ConfigError: Growth cannot begin with a batch that is asked for.
    """
    batches = options.batches or task.batches
    if above := [start for start in options.starts or () if start >= task.cap]:
        raise ConfigError(
            f"--starts {' '.join(map(str, above))}: growth of {task.name} ends at {task.cap}, so it has to begin with "
            "fewer; lower --starts, or give larger constant batches as --batches"
        )
    return replace(
        task,
        seeds=options.seeds or task.seeds,
        batches=batches,
        starts=options.starts or [start for start in options.batches or task.starts if start <= max(task.starts)],
        only=options.schedules or task.only,
    )


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a smoke run: seconds, with numbers that mean nothing")
    size.add_argument("--gpu", action="store_true", help="larger nets and budgets, for a GPU")
    made.add_argument("--task", nargs="+", default=[], help="which tasks, by name; default: all")
    made.add_argument("--budget", type=positive, help="gradient evaluations of a run; default: the task's")
    shape = {"nargs": 4, "type": positive, "metavar": ("LENGTH", "LAYERS", "WIDTH", "HEADS")}
    made.add_argument("--shape", **shape, help="of the GPT of the text tasks; default: 64 4 128 4")
    made.add_argument("--seeds", type=positive, help="of the fronts; default: the task's, 3")
    made.add_argument("--batches", nargs="+", type=positive, help="constant batches; default: the task's")
    made.add_argument("--starts", nargs="+", type=positive, help="b₀ of growth; default: --batches, or the task's")
    made.add_argument("--schedules", nargs="+", help="names of schedules, as in what-if, and auto; default: all")
    made.add_argument("--data", default=IMAGES, help="folder of CIFAR's Parquet files")
    made.add_argument(
        "--results", type=Path, help="folder of the results; default: runs/front, --quick: runs/front-quick"
    )
    made.add_argument(
        "--readme", nargs="?", type=Path, const=README, help="put tables into this file; default: README.md"
    )
    made.add_argument("--kind", default="", help="with --readme: a word that the section's name and title end with")
    return made


def main() -> None:
    """Run, tabulate, plot."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    folder = options.results or Path("runs") / ("front-quick" if options.quick else "front")
    try:
        for task in chosen(options):
            if task.name.startswith("text"):
                files = source_files()
                tell(f"{task.name}: {len(files):,} source files, {sum(f.stat().st_size for f in files) / 1e6:,.0f} MB")
            search, points, reports = measured(task, folder)
            if not points:
                tell(f"{task.name}: no run could be made, so there are no tables")
                continue
            tell(f"{task.name}: {search.runs.made} runs made, {len(search.runs.used) - search.runs.made} found")
            show(reports, markdown=True)
            if options.readme:
                publish(task, lead(task, search, command(task, options)), points, reports, options.readme, options.kind)
    except ConfigError as error:
        parser().error(str(error))


if __name__ == "__main__":
    main()
