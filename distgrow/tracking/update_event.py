"""The event of an update, and how its batch is split."""

from functools import partial
from typing import Any, TypedDict

from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress, finite
from distgrow.tracking.events import Skip, Step


class Shape(TypedDict):
    """Hold how an update's batch is split over ranks and micro-batches."""

    batch: int
    micro: int
    accum: int
    world: int


def shape_of(plan: Plan) -> Shape:
    """Return how the plan splits its batch."""
    return Shape(batch=plan.scheduled, micro=plan.micro, accum=plan.accum, world=plan.world)


def update_event(
    progress: Progress,
    plan: Plan,
    outcome: Outcome,
    epoch: int,
    time_s: float,
    samples_per_s: float,
    mfu_of_token: float | None = None,
) -> Step | Skip:
    """Return the event of an update.

    Args:
        progress: What the update left.
        plan: How it was split.
        outcome: What it did.
        epoch: Samples of one pass.
        time_s: Seconds of the run.
        samples_per_s: Samples of its batch in a second.
        mfu_of_token: Share of the devices' peak that one token a second takes. None: not known.
    """
    skip = partial(Skip, empty=outcome.empty or None, late=outcome.late or None)
    ledger, made = progress.ledger, Step if outcome.applied else skip
    return made(
        step=progress.step,
        samples=progress.samples,
        epoch=progress.samples / epoch,
        stage=plan.stage,
        **shape_of(plan),
        lr=plan.lr,
        loss=finite(outcome.loss),
        grad_norm=finite(outcome.grad_norm),
        grad_sq=finite(progress.noise.grad_sq.value),
        noise_trace=finite(progress.noise.variance.value),
        noise_scale=finite(progress.noise.scale),
        sfo=ledger.total,
        sfo_applied=ledger.applied,
        sfo_skipped=ledger.skipped,
        sfo_replayed=ledger.replayed,
        sfo_discarded=ledger.discarded,
        sfo_probe=ledger.probe,
        time_s=time_s,
        **_speeds(plan, outcome, samples_per_s, mfu_of_token),
        tokens=progress.tokens or None,
        delay=outcome.delay or None,
        active=plan.active,
        compute=progress.compute if progress.spared else None,
        density=progress.density * plan.share if progress.spared else None,
        drawn=None if plan.expected is None else plan.batch,
        sfo_extrapolated=ledger.extrapolated or None,
    )


def _speeds(plan: Plan, outcome: Outcome, samples_per_s: float, mfu_of_token: float | None) -> dict[str, Any]:
    """Return how fast an update was, by the keys of its event."""
    tokens_per_s = samples_per_s * outcome.tokens / plan.batch if outcome.tokens else None
    mfu = None if tokens_per_s is None or mfu_of_token is None else tokens_per_s * mfu_of_token
    return {"samples_per_s": samples_per_s, "tokens_per_s": tokens_per_s, "mfu": mfu}
