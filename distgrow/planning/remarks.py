"""Remarks of `distgrow plan`: what a reader of the plan must know beside its numbers."""

from distgrow.config.run import Run
from distgrow.core.counted import counted
from distgrow.core.rate_test import MOST_RATES
from distgrow.growth.controller import Controller
from distgrow.growth.draws import draws_size
from distgrow.growth.no_growth import no_growth
from distgrow.growth.objective import Objective
from distgrow.planning.cost import objective_of
from distgrow.theory import staleness
from distgrow.theory.pruning import pruned_samples
from distgrow.training.first_rate import most_evaluations, updates_of

RESET = "the optimizer's first moments begin anew wherever the batch changes"

NOT_SGD = "theory: its bound is one of SGD without momentum; nothing is predicted for this optimizer"

SHIFTED = "theory: its bound is one of gradients at the parameters; nothing is predicted with extrapolate"

DRAWN = "rows are drawn by coins: batches are means, and the first update that reaches the budget is the last"

TWICE = "extrapolate.kind=fresh evaluates each sample twice: twice the gradient evaluations that are shown"

NOT_DELAYED = "theory: its bound is one without engine.delay; nothing is predicted"

PROBED = "run.probe's evaluations are charged to budget.sfo: there will be fewer updates than are shown"

AUTO = "engine.max_micro=auto: shown as if memory held every share; it is measured when the run begins"


def remarks(run: Run, controller: Controller) -> list[str]:
    """Return what a reader of the plan must know beside its numbers."""
    aim = objective_of(run)
    return [
        *([] if aim is None else [aim.sentence(), *_other_workers(aim, controller)]),
        *_measured(run, controller),
        *([word] if (word := no_growth(controller)) is not None else []),
        *controller.growth.remarks(),
        *([RESET] if controller.at_growth.moments == "reset" else []),
        *([DRAWN] if draws_size(controller.sampling) else []),
        *([AUTO] if run.engine.max_micro == "auto" else []),
        *([NOT_SGD] if run.theory is not None and not run.optimizer.plain_sgd else []),
        *([SHIFTED] if run.theory is not None and run.extrapolate is not None else []),
        *([TWICE] if run.extrapolate is not None and run.extrapolate.evaluations > 1 else []),
        *(_delayed(run, controller) if run.engine.delay else []),
        *run.engine.lateness(max(batch for _, batch in controller.reach())),
        *_pruning(controller),
        *_experts(controller),
        *([PROBED] if run.run.probe.every_epochs is not None and run.budget.sfo is not None else []),
    ]


def _delayed(run: Run, controller: Controller) -> list[str]:
    """Return what the delay of gradients makes of the batches, beside the critical delay if it is known."""
    delay, theory = run.engine.delay, run.applicable_theory()
    batch = max(batch for _, batch in controller.reach())
    lines = [
        f"engine.delay={delay}: a batch b counts as (τ + 1)·b against the critical batch, up to {(delay + 1) * batch:,}"
    ]
    if theory is not None:
        lines.append(NOT_DELAYED)
        critical = staleness.critical_delay(0.0, theory.variance, theory.epsilon**2, batch)
        lines.append(f"delays well below (σ²/ε²)/b = {critical:,.1f} updates cost next to nothing at batch {batch:,}")
    return lines


def _other_workers(aim: Objective, controller: Controller) -> list[str]:
    """Return that the plan is on other workers than the objective; nothing if it is on the same."""
    ranks = sorted({controller.ranks(stage) for stage, _ in controller.reach()})
    if ranks == [aim.workers]:
        return []
    shown = f"{ranks[0]:,}" if len(ranks) == 1 else f"{ranks[0]:,} to {ranks[-1]:,}"
    return [f"the plan splits batches over launch.workers={shown}, and the objective is of {aim.workers:,}"]


def _measured(run: Run, controller: Controller) -> list[str]:
    """Return what measuring the first learning rate costs at most; nothing if it is known."""
    if not run.open_rate:
        return []
    updates, most = updates_of(run, controller.epoch), most_evaluations(run, controller.epoch)
    fewer = ", which budget.sfo leaves for fewer updates than are shown" if controller.budget.sfo else ""
    return [
        f"lr.base=auto: measured before the first update by at most {MOST_RATES} short runs of "
        f"{counted(updates, 'update')} at batch {controller.growth.start}, at most "
        f"{counted(most, 'gradient evaluation')}, in the ledger's probe{fewer}"
    ]


def _experts(controller: Controller) -> list[str]:
    """Return what active experts make of the run's compute; nothing if there are none, or the model is pruned, too."""
    weights, sparsity, total = controller.weights, controller.sparsity, controller.whole_axis.samples
    if weights is None or (sparsity is not None and sparsity.target):
        return []
    mean = weights.average
    return [
        f"a token uses {mean:.4g} of the blocks' weights on average: a compute of "
        f"{counted(f'{mean * total:,.0f}', 'evaluation')} with all {weights.experts} experts"
    ]


def _pruning(controller: Controller) -> list[str]:
    """Return when the model is pruned, and what the run costs; nothing if it stays dense."""
    sparsity, total = controller.sparsity, controller.whole_axis.samples
    if sparsity is None or not sparsity.target:
        return []
    first, last = pruned_samples(sparsity.target, sparsity.start, sparsity.end)
    mean = sparsity.average_density
    return [
        f"pruned to a density of {1 - sparsity.target:.4g} from sample {first * total:,.0f} to {last * total:,.0f}, in "
        f"{counted(sparsity.prunings, 'step')} at most; {mean:.4g} on average: a compute of "
        f"{counted(f'{mean * total:,.0f}', 'evaluation')} of the dense model"
    ]


def groups(run: Run) -> list[str]:
    """Return a line for each group of parameters, if the optimizer has any.

    Raises:
        ConfigError: It cannot train the model.
    """
    if not (run.optimizer.groups or run.optimizer.no_decay or run.optimizer.always_shown):
        return []
    from distgrow.engine.objective import WeightedLoss

    task = run.task.build(run.model)
    named = WeightedLoss(task.model, task.loss).named()
    run.optimizer.check_own(named, task.model, None if run.lr.base == "auto" else run.lr.base)
    return run.optimizer.shown(named, task.model)
