"""Gradient evaluations (SFO) and serial steps that policies of batch size and learning rate need to reach targets.

    python benchmarks/sfo.py [--task quadratic digits cifar10 text] [--quick | --full] [--data FOLDER] [--readme [FILE]]

Every policy and baseline has a grid of settings. All of a grid run with one seed; the settings with the fewest
evaluations or steps to a target then run with more. Each run is a line of FOLDER/TASK.jsonl, and what is there is not
run again. Tables and plots are made of those lines; --readme puts them into benchmarks/README.md.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from paired import Report, hardware, show, tell
from sfo_contestants import Contestant, Unavailable
from sfo_plots import pareto
from sfo_problems import Problem
from sfo_readme import section, write
from sfo_results import Setting, Store, finalists, provenance, result_of, settings
from sfo_sizes import SEEDS, add_options, folder_of, positive, problems, size_of
from sfo_tables import MEASURES, final_loss, tables
from suite_sections import source, today

from distgrow.core.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
LEGEND = (
    "Epochs of gradient evaluations / serial steps to each target, with the setting that is best for that target: "
    "medians over seeds, with quartiles. ÷: both, of the setting named, over those of the best tuned baseline, at the "
    "last target."
)


def run_all(problem: Problem, store: Store, seeds: int, policies: Sequence[str]) -> None:
    """All settings with the first seed, the best of each policy with the others."""
    contestants = [c for c in problem.contestants() if not policies or c.policy in policies]
    absent: dict[tuple[str, str], list[str]] = {}
    for contestant in contestants:
        if (reason := run_one(problem, contestant, 0, store)) is not None:
            absent.setdefault((contestant.policy, reason), []).append(contestant.setting)
    for (policy, reason), names in absent.items():
        tell(f"{problem.name}: {policy}, {len(names)} settings: {reason}")
    chosen = {(setting.policy, setting.name) for setting in best(problem, store)}
    for contestant in contestants if problem.random else ():
        for seed in range(1, seeds):
            if (contestant.policy, contestant.setting) in chosen:
                run_one(problem, contestant, seed, store)


def best(problem: Problem, store: Store) -> list[Setting]:
    """Return the settings of each policy that run with more seeds, chosen by their runs with the first."""
    tuned = settings(result for result in problem.own(store.results) if result.seed == 0)
    chosen: list[Setting] = []
    for policy in problem.policies:
        own = [setting for setting in tuned if setting.policy == policy.name]
        if not policy.tuned:
            chosen += own
            continue
        chosen += finalists(own, "grad_norm", problem.grad_norms) + finalists(own, "held_loss", problem.held_losses)
        chosen += [] if problem.arrives or not own else [min(own, key=final_loss)]
    return chosen


def run_one(problem: Problem, contestant: Contestant, seed: int, store: Store) -> str | None:
    """One run, unless its result is there; why it cannot take part, if it cannot."""
    key = problem.run_key(contestant, seed)
    if key in store:
        return None
    course, began = problem.course(), time.monotonic()
    try:
        epoch, ending = problem.play(contestant.run(problem.base), seed, course, problem.stop_at)
    except Unavailable as reason:
        return str(reason)
    except ConfigError as error:
        return f"refused: {str(error).splitlines()[0]}"
    seconds = time.monotonic() - began
    result = result_of(
        course,
        hardware=hardware(),
        problem=problem.key,
        policy=contestant.policy,
        setting=contestant.setting,
        seed=seed,
        key=key,
        config=contestant.config(problem.base),
        epoch=epoch,
        ending=ending,
        seconds=seconds,
        made=f"{source(ROOT)} · {today()}",
    )
    store.add(result)
    tell(
        f"{problem.name}: {contestant.policy}, {contestant.setting}, seed {seed}: {ending}, {result.sfo / epoch:.1f} "
        f"epochs, {result.steps:,} steps, ‖∇f‖ {course.grad_norm.lowest:.4g}, {seconds:.1f} s"
    )
    return None


def report(problem: Problem, store: Store, plots: Path) -> tuple[list[Report], list[tuple[str, Path]]]:
    """The tables of a task, and its plots (caption, file), drawn into a folder."""
    among = settings(problem.own(store.results))
    if not among:
        return [], []
    images: list[tuple[str, Path]] = []
    for measure, targets in (("grad_norm", problem.grad_norms), ("held_loss", problem.held_losses)):
        if (figure := pareto(problem, among, measure, targets)) is not None:
            plots.mkdir(parents=True, exist_ok=True)
            file = plots / f"sfo-{problem.name}-{measure.replace('_', '-')}.png"
            figure.savefig(file)
            images.append((f"{problem.title}: gradient evaluations against serial steps to {MEASURES[measure]}", file))
    return tables(problem, among), images


def publish(problem: Problem, store: Store, command: str, readme: Path) -> None:
    """Put a task's tables into a Markdown file, its plots beside that."""
    reports, images = report(problem, store, readme.parent / "plots")
    if not reports:
        return
    results = problem.own(store.results)
    machines = sorted({result.hardware for result in results})
    lead = f"`{command}` · {'; '.join(machines)} · {problem.about}\n\nRuns: {provenance(results)}\n\n{LEGEND}"
    pictures = [(caption, str(file.relative_to(readme.parent))) for caption, file in images]
    write(readme, f"sfo-{problem.name}", section(problem.title, lead, reports, pictures))


def command(problem: Problem, size: str, options: argparse.Namespace) -> str:
    """What runs a task again as it was asked for."""
    chosen = {"seeds": options.seeds, "subset": options.subset, "epochs": options.epochs}
    if "path" not in problem.base.get("task", {}).get("args", {}) or problem.name == "text":
        chosen = {"seeds": options.seeds}  # it has no images
    flags = ["" if size == "standard" else f" --{size}"] + [f" --{k} {v:g}" for k, v in chosen.items() if v is not None]
    return f"python benchmarks/sfo.py --task {problem.name}{''.join(flags)}"


def main() -> None:
    """Run, tabulate, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--policy", nargs="+", default=[], help="which policies, by name; default: all")
    parser.add_argument("--seeds", type=positive, help="seeds of the best settings; default: 5")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plots of what is there")
    options = parser.parse_args()
    size, folder = size_of(options), folder_of(options)
    torch.set_num_threads(1)
    try:
        tasks = problems(options)
    except ConfigError as error:
        parser.error(str(error))
    known = dict.fromkeys(policy.name for problem in tasks for policy in problem.policies)
    if unknown := set(options.policy) - set(known):
        parser.error(f"--policy {' '.join(sorted(unknown))}: choose from {', '.join(known)}")
    for problem in tasks:
        store = Store(folder / f"{problem.name}.jsonl")
        if (reason := problem.not_ready()) is not None:
            tell(f"{problem.name}: left out: {reason}")
            continue
        if not options.report:
            run_all(problem, store, options.seeds or SEEDS[size], options.policy)
        show(report(problem, store, folder)[0], markdown=True)
        if options.readme:
            publish(problem, store, command(problem, size, options), options.readme)


if __name__ == "__main__":
    main()
