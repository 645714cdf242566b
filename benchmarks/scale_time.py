"""Seconds to a target on 1 … 4096 workers, simulated from the batches that the runs of the SFO benchmark really took.

    python benchmarks/scale_time.py [--task digits …] [--results FOLDER] [--measured] [--samples-per-s …] [--readme]

With --objective the table is of auto whose start and cap follow from growth.objective for each W, beside auto and
decays; what of their runs is not there yet is run. Ratios are over the decays of the SFO benchmark; decays at larger
constant batches have a row of their own.

An update of b samples on W workers takes latency + ⌈b/w⌉ / samples_per_s + all-reduce(w) seconds on the w = min(W, b)
workers that have a sample; all-reduce(w) = 2·log₂(w)·hop + 2·(w − 1)/w·bytes/bandwidth, and nothing on one. The
constants are given, or with --measured those of the updates on the machine that made the results.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from paired import Report, show
from scale_cluster import WORKERS, Cluster
from scale_objective import WIDE, at_scale, suits
from sfo import run_all
from sfo_plots import times
from sfo_problems import Problem
from sfo_readme import section, write
from sfo_results import Result, Setting, Store, provenance, quartiles, settings
from sfo_sizes import add_options, folder_of, positive, positive_real, problems
from sfo_tables import MEASURES, family, number

from distgrow.core.errors import ConfigError
from distgrow.core.pace import fitted

MODEL = (
    "an update of b samples takes latency + ⌈b/w⌉ ÷ samples/s + all-reduce(w) on the w = min(W, b) of W workers that "
    "have a sample; all-reduce(w) = 2·log₂(w)·message + 2·(w − 1)/w·gradients ÷ link; each policy with the setting "
    "that is fastest on so many workers"
)


def measured(results: Iterable[Result], given: Cluster) -> Cluster:
    """The cluster with samples/s and latency of the results' own updates; ConfigError where they do not tell."""
    timed = [(batch, 1, seconds) for result in results for batch, count, seconds in result.timings if count > 2]
    pace = fitted(timed)
    network = {name: getattr(given, name) for name in ("megabytes", "gigabytes_per_s", "hop_us")}
    return Cluster(samples_per_s=pace.samples_per_s, latency_s=pace.latency_s, **network)


def time_to(setting: Setting, cluster: Cluster, workers: int, measure: str, target: float) -> float:
    """Median seconds of a setting's runs to a target; inf where the median run never came there."""
    return quartiles(seconds_to(run, cluster, workers, measure, target) for run in setting.runs).median


def seconds_to(run: Result, cluster: Cluster, workers: int, measure: str, target: float) -> float:
    """Seconds of a run until the update with which it came to a target."""
    step = run.crossing(measure, target)[1]
    return cluster.seconds(run.stretches_to(step), workers) if math.isfinite(step) else math.inf


def fastest(among: Sequence[Setting], cluster: Cluster, workers: int, measure: str, target: float) -> tuple[float, str]:
    """Seconds and name of the setting that is there first on so many workers."""
    timed = [(time_to(setting, cluster, workers, measure, target), setting.name) for setting in among]
    return min(timed, default=(math.inf, ""))


def table(
    problem: Problem, among: Sequence[Setting], cluster: Cluster, measure: str, target: float
) -> tuple[Report, dict[str, dict[int, float]]]:
    """Each policy's seconds on each number of workers, over the best LR decay's there; and the seconds alone."""
    decays = [setting for setting in among if setting.policy in family(problem, "decay") - {WIDE}]
    reference = {workers: fastest(decays, cluster, workers, measure, target)[0] for workers in WORKERS}
    rows: list[list[str]] = []
    seconds: dict[str, dict[int, float]] = {}
    for policy in problem.policies:
        own = [setting for setting in among if setting.policy == policy.name]
        best = {
            workers: fastest([s for s in own if suits(s, problem, cluster, workers)], cluster, workers, measure, target)
            for workers in WORKERS
        }
        if not math.isfinite(best[1][0]):
            continue
        seconds[policy.name] = {workers: best[workers][0] for workers in WORKERS}
        cells = [f"{value:,.3g} ({number(value / reference[workers], '.2f')})" for workers, (value, _) in best.items()]
        rows.append([policy.name, *cells, best[WORKERS[0]][1], best[WORKERS[-1]][1]])
    title = f"{problem.title}: seconds to {MEASURES[measure]} ≤ {target:g} by number of workers (÷ best LR decay)"
    columns = ["policy", *(f"{workers:,}" for workers in WORKERS), "setting on 1", f"setting on {WORKERS[-1]:,}"]
    return Report(title=title, columns=columns, rows=rows), seconds


def last_target(problem: Problem, among: Sequence[Setting]) -> tuple[str, float] | None:
    """The lowest target that a decaying and a growing policy reach; of the held-out loss where runs have budgets."""
    names = {name: family(problem, name) for name in ("decay", "growth")}
    targets: Mapping[str, Sequence[float]] = {"grad_norm": problem.grad_norms, "held_loss": problem.held_losses}
    for measure in ("grad_norm", "held_loss") if problem.arrives else ("held_loss", "grad_norm"):
        for target in reversed(targets[measure]):
            reached = {s.policy for s in among if math.isfinite(s.rank(measure, target)[0])}
            if all(reached & members for members in names.values()):
                return measure, target
    return None


def simulate(problem: Problem, results: Sequence[Result], cluster: Cluster, name: str, readme: Path | None) -> None:
    """The table of one task, printed, and put into a Markdown file where one is given."""
    among = settings(results)
    if (aim := last_target(problem, among)) is None:
        print(f"{problem.name}: no target that a decaying learning rate and a growing batch both reach")
        return
    report, seconds = table(problem, among, cluster, *aim)
    print(f"{problem.name}: {cluster}")
    show([report], markdown=True)
    if readme is None:
        return
    plots = readme.parent / "plots"
    plots.mkdir(exist_ok=True)
    file = plots / f"{name}.png"
    times(problem, seconds, f"{MEASURES[aim[0]]} ≤ {aim[1]:g}").savefig(file)
    option, of = ("", "time to target at scale") if name.startswith("scale") else (" --objective", "auto for each W")
    command = f"`python benchmarks/scale_time.py --task {problem.name}{option}`"
    lead = f"{command} · simulated · {cluster} · {MODEL}\n\nRuns: {provenance(results)}"
    image = (report.title, str(file.relative_to(readme.parent)))
    write(readme, name, section(f"{problem.title}: {of}", lead, [report], [image]))


def scaled(problem: Problem, store: Store, given: Cluster, options: argparse.Namespace) -> None:
    """Time at scale of one task, from the runs that are there; with --objective also from those that it makes."""
    if not options.objective:
        results = problem.own(store.results)
        cluster = measured(results, given) if options.measured and results else given
        simulate(problem, results, cluster, f"scale-{problem.name}", options.readme)
        return
    problem = at_scale(problem, given)
    run_all(problem, store, options.seeds, ())
    results = [result for result in problem.own(store.results) if result.seed < options.seeds]
    simulate(problem, results, given, f"objective-{problem.name}", options.readme)


def main() -> None:
    """Simulate, tabulate, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--objective", action="store_true", help="auto with an objective for each number of workers")
    parser.add_argument("--seeds", type=positive, default=1, help="of --objective: how many; default: 1")
    parser.add_argument("--measured", action="store_true", help="samples/s and latency of the results' own updates")
    constants = Cluster.__dataclass_fields__
    for field in constants.values():
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=positive_real, default=field.default)
    options = parser.parse_args()
    given = Cluster(**{name: getattr(options, name) for name in constants})
    if options.objective and options.measured:
        parser.error("--objective --measured: batches are decided for the constants that are given; leave one out")
    try:
        for problem in problems(options):
            store = Store(folder_of(options) / f"{problem.name}.jsonl")
            scaled(problem, store, given, options)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
