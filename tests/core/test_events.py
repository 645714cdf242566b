"""Events are read as they were written, whatever a newer version added, and a value of another kind is refused."""

import json
import math
from dataclasses import fields
from typing import Any, get_args

import pytest

from distgrow.core.plan import Plan
from distgrow.core.progress import Ledger, Outcome, Progress
from distgrow.tracking.base_event import Event, Place
from distgrow.tracking.branch_events import Branch, BranchTest
from distgrow.tracking.events import (
    Checkpoint,
    End,
    Evaluation,
    GradientProbe,
    Known,
    MemoryProbe,
    OutOfMemory,
    ParameterNoise,
    RateChoice,
    RateTrial,
    Rebudget,
    Resize,
    Resume,
    ServiceId,
    Stage,
    Start,
    from_json,
)
from distgrow.tracking.update_event import shape_of, update_event

PLACE = Place(step=3, samples=96, sfo=128, time_s=1.5)
PLAN = Plan(batch=32, world=2, micro=8, accum=2, lr=0.1, stage=1)
PROGRESS = Progress(step=3, samples=96, stage=1, ledger=Ledger(applied=96, probe=32))
SHAPE = shape_of(PLAN)


def update(*, applied: bool) -> Event:
    """The event of an update."""
    outcome = Outcome(applied=applied, loss=0.5 if applied else math.nan, grad_norm=2.0)
    return update_event(PROGRESS, PLAN, outcome, epoch=48, time_s=1.5, samples_per_s=640.0)


EVENTS = [
    Start(**PLACE, dir="runs/x", world=2, budget_samples=960),
    Resume(**PLACE, checkpoint="step-00000003", damaged=["a file"], restore_s=0.1, sfo_replayed=0),
    Rebudget(**PLACE, old="epochs=2", new="epochs=4", changes=["growth.cap is 8, was 4"], voided="no improvement"),
    Resize(**PLACE, old=1, new=2, wanted=2, seconds=3.0),
    Stage(**PLACE, epoch=2.0, stage=1, **SHAPE, lr=0.1),
    update(applied=True),
    update(applied=False),
    OutOfMemory(**PLACE, **SHAPE, sfo_discarded=32),
    Evaluation(**PLACE, epoch=2.0, more={"loss": 0.25, "accuracy": None}),
    ParameterNoise(**PLACE, names=["weight", "bias"], grad_sq=[0.5, -0.1], noise_trace=[2.0, None]),
    GradientProbe(**PLACE, epoch=2.0, evaluations=48, sfo_probe=48, norm=0.5, loss=None, seconds=0.2, more={"lr": 0.1}),
    MemoryProbe(**PLACE, micro=8, fits=True),
    Branch(**PLACE, batch=32, lr=0.1, evaluations=128),
    BranchTest(
        **PLACE,
        epoch=2.0,
        goes_by="validation",
        window=32,
        batches=[16, 32],
        lrs=[0.1, 0.2],
        losses=[[0.5, None], [0.5, 0.4]],
        validation=[0.5, 0.25],
        differences=[0.0, None],
        errors=[0.0, 0.1],
        winner=1,
        batch=32,
        evaluations=64,
        sfo_probe=64,
        seconds=0.5,
        more={"tolerance": 0.01},
    ),
    RateTrial(**PLACE, lr=0.2, loss=None, evaluations=160, seconds=0.1),
    RateChoice(
        **PLACE,
        base=0.1,
        largest_stable=0.1,
        first_loss=2.0,
        lrs=[0.1, 0.2],
        losses=[0.5, None],
        verdicts=["stable", "unstable"],
        batch=8,
        updates=20,
        evaluations=320,
        seconds=0.2,
    ),
    Checkpoint(**PLACE, path="step-00000003", seconds=0.1, stall_s=0.01),
    ServiceId(**PLACE, id="abc"),
    End(**PLACE, reason="done"),
]
#: Keys that each line has had since the first version, in the order in which they are written.
KEYS = {
    "start": "step samples sfo time_s dir world budget_samples",
    "resume": "step samples sfo time_s checkpoint damaged restore_s sfo_replayed",
    "rebudget": "step samples sfo time_s old new changes voided",
    "resize": "step samples sfo time_s old new wanted seconds",
    "stage": "step samples sfo time_s epoch stage batch micro accum world lr",
    "step": "step samples epoch stage batch micro accum world lr loss grad_norm grad_sq noise_trace noise_scale sfo "
    "sfo_applied sfo_skipped sfo_replayed sfo_discarded sfo_probe time_s samples_per_s",
    "oom": "step samples sfo time_s batch micro accum world sfo_discarded",
    "eval": "step samples sfo time_s epoch loss accuracy",
    "parameter_noise": "step samples sfo time_s names grad_sq noise_trace",
    "probe": "step samples sfo time_s epoch evaluations sfo_probe norm loss seconds lr",
    "branch": "step samples sfo time_s batch lr evaluations",
    "branches": "step samples sfo time_s epoch goes_by window batches lrs losses validation differences errors winner "
    "batch evaluations sfo_probe seconds tolerance",
    "lr_trial": "step samples sfo time_s lr loss evaluations seconds",
    "lr_choice": "step samples sfo time_s base largest_stable first_loss lrs losses verdicts batch updates evaluations "
    "seconds",
    "checkpoint": "step samples sfo time_s path seconds stall_s",
    "tracker": "step samples sfo time_s id",
    "end": "step samples sfo time_s reason",
}


def test_there_is_an_event_of_each_kind() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Known))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_is_read_back_as_it_was_written(event: Event) -> None:
    assert from_json(json.loads(json.dumps(event.to_json(), allow_nan=False))) == event


@pytest.mark.parametrize(
    "event", [event for event in EVENTS if not isinstance(event, MemoryProbe)], ids=lambda e: e.kind
)
def test_the_keys_of_a_line_are_those_that_other_programs_know(event: Event) -> None:
    assert " ".join(event.to_json()) == f"event {KEYS[event.kind if event.kind != 'skip' else 'step']}"


def test_keys_and_kinds_of_a_newer_version_are_kept() -> None:
    line = {**EVENTS[3].to_json(), "rotation": [0.9], "sfo_probe": 3}
    assert from_json(line).to_json() == line
    unknown = {"event": "certificate", "step": 1, "samples": 8, "time_s": 0.5, "held": {"yes": True}}
    assert from_json(unknown).to_json() == unknown


TEXTS, OF_EITHER_SIGN = ["x", ""], [-1, -0.5]
NO_VALUES = [[1], {}, 10**400, math.inf, -math.inf, math.nan]
SIGNED = {"loss", "grad_norm", "grad_sq", "noise_trace", "noise_scale", "norm", "first_loss", "lrs", "losses"}


def other_kinds(event: Event, name: str) -> list[Any]:
    """Values that the field must not hold."""
    value = getattr(event, name)
    bad = [
        *NO_VALUES,
        *([] if isinstance(value, str) else TEXTS),
        *([] if isinstance(value, bool) or name in ("empty", "late") else [True]),
    ]
    if isinstance(value, list) and isinstance(value[0], int | float):
        bad.remove([1])  # a list of numbers
        bad.append(["x"])
    return bad if name in SIGNED and not isinstance(value, list) else [*bad, *OF_EITHER_SIGN]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_no_field_takes_a_value_of_another_kind(event: Event) -> None:
    for name in (field.name for field in fields(event) if field.name != "more"):
        for bad in other_kinds(event, name):
            with pytest.raises(ValueError, match=rf"holds {name}=.*, which must be "):
                from_json({**event.to_json(), name: bad})
