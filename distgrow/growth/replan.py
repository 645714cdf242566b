"""Replan: what another budget changes in the decisions of a run, those made and those to come. Pure."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from distgrow.core.budget import Budget
from distgrow.core.counted import counted
from distgrow.core.progress import Progress
from distgrow.core.stages import stage_at
from distgrow.growth.controller import Controller

#: Places at which decisions are compared, of the part done and of the part to come.
PLACES = 33
#: Stages whose beginnings are named.
SHOWN = 3


def overspent(budget: Budget, progress: Progress, epoch: int) -> bool:
    """Return whether the run has done more than a budget allows."""
    if budget.tokens is not None:
        return progress.tokens > budget.tokens
    if budget.steps is not None:
        return progress.step > budget.steps
    return budget.left(progress, epoch) < 0


def replanned(old: Controller, new: Controller, at: Progress) -> list[str]:
    """Return what a run would have decided otherwise up to where both budgets end, a sentence each.

    Args:
        old: The decisions under the budget that the run has had.
        new: Those under another budget; all other settings are equal.
        at: Where the run stands.

    Returns:
        Nothing if the two differ in where the run ends alone. The decisions of a policy by its own measurements are
        compared at `at` only.
    """
    lines = [
        f"growth.{key} is {new_value}, was {old_value}"
        for (key, old_value), new_value in zip(old.growth, dict(new.growth).values(), strict=True)
        if old_value != new_value
    ]
    lines += _stages(old, new)
    if not lines and old.advance(at).stage != new.advance(at).stage:
        lines.append(f"the coming stage is {new.advance(at).stage}, was {old.advance(at).stage}")
    places = [replace(at, stage=stage, ledger=replace(at.ledger, applied=s)) for stage, s in _places(old, new, at)]
    compared = (
        (_rate, "the learning rate"),
        (_weight, "the weight of an update in the average"),
        (_active, "the number of active experts"),
        (_density, "the density of the model"),
    )
    for of, what in compared:
        lines += _compared(places, at.ledger.applied, partial(of, old), partial(of, new), what)
    return lines


def cut_short(old: Controller, at: Progress) -> bool:
    """Return whether the run has come to its end, and the last updates were no whole batches, as the budget ended."""
    whole = at.stage_step * old.growth.stage_batch(at.stage)
    return old.budget.left(at, old.epoch) <= 0 and at.stage_samples != whole


def _rate(controller: Controller, at: Progress) -> float:
    """Return the learning rate of a whole batch."""
    return controller.rate(at, controller.growth.stage_batch(at.stage))


def _weight(controller: Controller, at: Progress) -> float:
    """Return the weight of a whole batch in the average of the parameters; 0 without one."""
    average, batch = controller.average, controller.growth.stage_batch(at.stage)
    return 0.0 if average is None else average.weight(at.ledger.applied, batch, controller.whole_axis)


def _active(controller: Controller, at: Progress) -> float:
    """Return the active experts; 0 without a schedule of them."""
    active = controller.active
    return 0 if active is None else active.at(at, controller.whole_axis)


def _density(controller: Controller, at: Progress) -> float:
    """Return the density of a whole batch; 1 without sparsity."""
    sparsity, batch = controller.sparsity, controller.growth.stage_batch(at.stage)
    middle = at.ledger.applied + batch / 2
    return 1.0 if sparsity is None else sparsity.density(middle, controller.whole_axis.samples)


def _stages(old: Controller, new: Controller) -> list[str]:
    """Return where stages begin that would have begun elsewhere."""
    moved = [(stage + 1, was, now) for stage, was, now in _ends(old, new) if was != now]
    unit = old.stage_ends.axis.removesuffix("s")
    lines = [f"stage {stage} begins {_place(now, unit)}, was {_place(was, unit)}" for stage, was, now in moved[:SHOWN]]
    return [*lines, *[f"{counted(len(moved) - SHOWN, 'more stage')} begin elsewhere"] * (len(moved) > SHOWN)]


def _place(end: float, unit: str) -> str:
    return f"at {unit} {end:,}" if end < math.inf else "never"


def _ends(old: Controller, new: Controller) -> Iterator[tuple[int, float, float]]:
    """Yield (stage, end before, end now) of the stages that end before both budgets do."""
    horizon = min(_end_of(old), _end_of(new))
    last, stage = min(old.growth.last_stage, new.growth.last_stage), 0
    while stage < last:
        was, now = old.stage_ends.end(stage), new.stage_ends.end(stage)
        if min(was, now) >= horizon:
            return
        yield stage, was, now
        stage += 1


def _end_of(controller: Controller) -> float:
    """Return where the planned run ends on the axis of its stages."""
    if controller.stage_ends.axis == "samples":
        return controller.samples()
    return sum(updates for _, _, updates in controller.outline(Progress()))


def _places(old: Controller, new: Controller, at: Progress) -> Iterator[tuple[int, int]]:
    """Yield (stage, applied samples) at which to compare, up to where the shorter run ends; first where it stands."""
    done, end = at.ledger.applied, min(old.samples(), new.samples())
    yield at.stage, done
    by_samples = not old.growth.adaptive and old.stage_ends.axis == "samples"
    spread = {*_spread(0, min(done, end) - 1), *_spread(done + 1, end - 1)}
    for samples in sorted(spread | {place for place in _experts_change(old, at, end) if place != done}):
        stage = stage_at(old.stage_ends, 0, samples, old.growth.last_stage) if by_samples else at.stage
        yield stage, samples


def _experts_change(old: Controller, at: Progress, end: int) -> Iterator[int]:
    """Yield the samples below `end` before and after each change of the number of active experts."""

    def experts(samples: int) -> float:
        return _active(old, replace(at, ledger=replace(at.ledger, applied=samples)))

    place = 0
    while old.active is not None and place < end:
        now = experts(place)
        place = bisect_left(range(end), True, lo=place, key=lambda samples, now=now: experts(samples) != now)
        yield from range(place - 1, min(place + 1, end))


def _spread(first: int, last: int) -> list[int]:
    """Return evenly spaced samples, both ends among them; none if there are none."""
    if last < first:
        return []
    return sorted({first + (last - first) * k // (PLACES - 1) for k in range(PLACES)})


def _compared(
    places: Sequence[Progress],
    done: int,
    old: Callable[[Progress], float],
    new: Callable[[Progress], float],
    what: str,
) -> list[str]:
    """Return a sentence for where the run stands, or else for the greatest difference before and after."""
    found = [(place, old(place), new(place)) for place in places]
    found = [(place, was, now) for place, was, now in found if not math.isclose(was, now, rel_tol=1e-9, abs_tol=1e-15)]
    here = [entry for entry in found if entry[0].ledger.applied == done]
    past = [entry for entry in found if entry[0].ledger.applied < done]
    coming = [entry for entry in found if entry[0].ledger.applied > done]
    lines = [f"{what} at sample {done:,}, where the run stands, is {now:.4g}, was {was:.4g}" for _, was, now in here]
    for part, when in ((past, "which is done"), ([] if here else coming, "which is to come")):
        if part:
            place, was, now = max(part, key=lambda entry: abs(entry[2] - entry[1]))
            applied = place.ledger.applied
            lines.append(f"{what} at sample {applied:,}, {when}, is {now:.4g}, was {was:.4g}")
    return lines
