"""When branches of a run are due, and how one begins: Progress in, Progress out. Pure."""

from distgrow.core.progress import Progress
from distgrow.growth.at_growth import marked
from distgrow.growth.branching import Branching, Candidate
from distgrow.growth.controller import Controller


def branches_due(controller: Controller, progress: Progress) -> bool:
    """Return whether growth wants branches here, and the budget has room for them and an update after them."""
    growth = controller.growth
    if not isinstance(growth, Branching) or not growth.affordable(progress):
        return False
    needed = growth.branch_samples(progress.stage) + growth.start
    if controller.budget.sfo is not None:
        needed += growth.test_cost(progress.stage)
    return controller.budget.left(progress, controller.epoch) >= needed


def branches_bound(controller: Controller, samples: int) -> int | None:
    """Return the evaluations that tests of a run of so many samples cost, at most; None: growth makes none."""
    growth = controller.growth
    return growth.most_spent(samples) if isinstance(growth, Branching) else None


def begun(controller: Controller, progress: Progress, candidate: Candidate) -> Progress:
    """Return the progress at the beginning of a branch."""
    branch = progress.grow(candidate.stages).with_policy(candidate.state)
    return marked(controller.at_growth, controller.growth, progress, branch)
