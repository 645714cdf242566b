"""Tables of the SFO benchmark: evaluations and steps to targets, and how good the models were."""

import math
from collections.abc import Callable, Iterable, Sequence

from paired import Report
from sfo_contestants import Policy, Unavailable
from sfo_problems import Problem
from sfo_results import Quartiles, Result, Setting, best_setting, quartiles

Row = list[str]
MEASURES = {"grad_norm": "‖∇f‖", "held_loss": "held-out loss"}
QUALITIES = {"loss": "training loss", "held_loss": "held-out loss", "accuracy": "accuracy"}


def tables(problem: Problem, among: Sequence[Setting]) -> list[Report]:
    """All tables of one task."""
    reports = [to_targets(problem, among, "grad_norm", problem.grad_norms)]
    if problem.held_losses:
        reports.append(to_targets(problem, among, "held_loss", problem.held_losses))
    if not problem.arrives:
        reports.append(at_the_end(problem, among))
    return reports


def to_targets(problem: Problem, among: Sequence[Setting], measure: str, targets: Sequence[float]) -> Report:
    """Each policy's evaluations and steps to each target."""
    baselines = [baseline(problem, among, family, measure, targets[-1]) for family in ("constant", "decay")]
    shown = [name for name in QUALITIES if any(name in run.best for setting in among for run in setting.runs)]
    rows: list[Row] = []
    for policy in problem.policies:
        own = [setting for setting in among if setting.policy == policy.name]
        if not own:
            rows.append([policy.name, why_not(problem, policy)])
            continue
        named = named_setting(own, measure, targets)
        cells = [cell(best_setting(own, measure, target), measure, target) for target in targets]
        ratios = [against(named, other, measure, targets[-1]) for other in baselines]
        rows.append([policy.name, named.name, *cells, *ratios, *quality(named, shown)])
    aims = [f"{MEASURES[measure]} ≤ {target:g}" for target in targets]
    columns = ["policy", "setting, best for the last target that it reaches", *aims, "÷ best constant", "÷ best decay"]
    columns += ["‖∇f‖ last (lowest)", *(f"{QUALITIES[name]} last (best)" for name in shown), "seeds"]
    title = f"Epochs of gradient evaluations / serial steps to targets of {MEASURES[measure]}"
    return Report(title=title, columns=columns, rows=[row + [""] * (len(columns) - len(row)) for row in rows])


def at_the_end(problem: Problem, among: Sequence[Setting]) -> Report:
    """Each policy's setting with the lowest held-out loss at the end of its budget."""
    decays = [s for s in among if s.policy in family(problem, "decay")]
    reference, reported = best_at_the_end(decays) if decays else None, any(p.published for p in problem.policies)
    rows: list[Row] = []
    for policy in problem.policies:
        own = [setting for setting in among if setting.policy == policy.name]
        if not own:
            rows.append([policy.name, why_not(problem, policy)])
            continue
        chosen = best_at_the_end(own)
        epochs, steps = total(chosen, lambda run: run.sfo / run.epoch), total(chosen, lambda run: run.steps)
        over = steps / total(reference, lambda run: run.steps) if reference else math.nan
        spent = [f"{epochs:.1f}", f"{steps:,.0f}", number(over, ".2f")]
        rows.append([policy.name, chosen.name, *spent, *quality(chosen, QUALITIES), *[policy.published] * reported])
    columns = ["policy", "setting with the lowest held-out loss", "epochs", "steps", "steps ÷ best decay"]
    columns += ["‖∇f‖ last (lowest)", *(f"{QUALITIES[name]} last (best)" for name in QUALITIES), "seeds"]
    columns += ["published: lowest ‖∇f‖ / test %"] * reported
    title = "At the end of the budget"
    return Report(title=title, columns=columns, rows=[row + [""] * (len(columns) - len(row)) for row in rows])


# ── choosing ────────────────────────────────────────────────────────────────────────────────────────────────────


def family(problem: Problem, name: str) -> set[str]:
    """Names of the policies of a family."""
    return {policy.name for policy in problem.policies if policy.family == name}


def baseline(problem: Problem, among: Sequence[Setting], name: str, measure: str, target: float) -> Setting | None:
    """The best tuned setting of a family of baselines."""
    members = family(problem, name)
    candidates = [best_setting([s for s in among if s.policy == member], measure, target) for member in members]
    arrived = [setting for setting in candidates if setting is not None]
    return min(arrived, key=lambda setting: setting.rank(measure, target), default=None)


def named_setting(own: Sequence[Setting], measure: str, targets: Sequence[float]) -> Setting:
    """The best for the lowest target that the policy reaches at all."""
    found = (best_setting(own, measure, target) for target in reversed(targets))
    return next((setting for setting in found if setting is not None), own[0])


def best_at_the_end(own: Sequence[Setting]) -> Setting:
    """The lowest held-out loss at the end, of the settings run with the most seeds."""
    seeds = max(len(setting.runs) for setting in own)
    return min((setting for setting in own if len(setting.runs) == seeds), key=final_loss)


def final_loss(setting: Setting) -> float:
    """Held-out loss at the end; worst where the run diverged."""
    value = setting.last("held_loss").median
    return math.inf if math.isnan(value) or any(run.ending == "diverged" for run in setting.runs) else value


def why_not(problem: Problem, policy: Policy) -> str:
    """Why there is no result of a policy."""
    contestants = policy.contestants(problem.scale)
    if not contestants:
        return "needs constants that are not known here"
    try:
        contestants[0].run(problem.base)
    except Unavailable as reason:
        return str(reason)
    return "not run"


# ── cells ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cell(setting: Setting | None, measure: str, target: float) -> str:
    """Epochs of evaluations / steps to a target."""
    if setting is None:
        return "–"
    epoch = setting.runs[0].epoch
    sfo, steps = setting.sfo(measure, target), setting.steps(measure, target)
    single = len(setting.runs) == 1
    return f"{shown(sfo, 1 / epoch, ',.1f', single)} / {shown(steps, 1, ',.0f', single)}"


def against(setting: Setting, other: Setting | None, measure: str, target: float) -> str:
    """Evaluations and steps to a target over another's."""
    mine = setting.rank(measure, target)
    if other is None or math.isinf(mine[0]):
        return "–"
    theirs = other.rank(measure, target)
    return f"{mine[0] / theirs[0]:.2f} / {mine[1] / theirs[1]:.2f}"


def quality(setting: Setting, names: Iterable[str]) -> list[str]:
    """Return how good the model was: ‖∇f‖, losses, accuracy; and the number of seeds."""
    pairs = [
        f"{number(setting.last(name).median, '.4g')} ({number(setting.best(name).median, '.4g')})"
        for name in ("grad_norm", *names)
    ]
    return [*pairs, str(len(setting.runs))]


def total(setting: Setting, value: Callable[[Result], float]) -> float:
    """Median of something over a setting's whole runs."""
    return quartiles(value(run) for run in setting.runs).median


def shown(values: Quartiles, scale: float, form: str, single: bool) -> str:
    """Median (quartiles)."""
    low, median, high = (number(value * scale, form) for value in (values.low, values.median, values.high))
    return median if single else f"{median} ({low} … {high})"


def number(value: float, form: str) -> str:
    """A number, or a dash where there is none."""
    return format(value, form) if math.isfinite(value) else "–"
