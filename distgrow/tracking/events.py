"""Events of a run: a frozen class for each kind of line of metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from distgrow.core.progress import Progress
from distgrow.tracking.base_event import PLACE, SPENT, Event
from distgrow.tracking.branch_events import Branch, BranchTest
from distgrow.tracking.fields import (
    Above0,
    Amount,
    Count,
    Figure,
    Figures,
    OldAmount,
    OldCount,
    OldFigure,
    OldText,
    OldTexts,
    OldTruth,
    Positive,
    Text,
    Texts,
    Truth,
    shown_number,
)
from distgrow.tracking.rate_events import RateChoice, RateTrial


@dataclass(frozen=True, slots=True, kw_only=True)
class Start(Event):
    """Hold the beginning of a new run."""

    kind: ClassVar[str] = "start"

    dir: OldText = None  #: run.dir
    world: OldCount = None  #: ranks
    budget_samples: OldAmount = None  #: samples to go
    groups: OldTexts = None  #: a line for each group of parameters, if they train differently
    init: OldTexts = None  #: what weights the run begins with, and what was left out, if they are given


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Event):
    """Hold that a run goes on from a checkpoint."""

    kind: ClassVar[str] = "resume"

    checkpoint: OldText = None  #: its name
    damaged: OldTexts = None  #: what is wrong with newer ones
    restore_s: OldAmount = None  #: seconds that finding and loading it took
    sfo_replayed: OldCount = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebudget(Event):
    """Hold that a run goes on with another budget, from the checkpoint at this place."""

    kind: ClassVar[str] = "rebudget"

    old: OldText = None  #: the budget before, as epochs=40
    new: OldText = None
    changes: OldTexts = None  #: what the new plan decides otherwise
    voided: OldText = None  #: why a hook had ended the run here, which no longer counts

    def voids(self, progress: Progress) -> bool:
        """Return whether a hook's end of the run at `progress` no longer counts."""
        return self.voided is not None and progress.samples <= self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize(Event):
    """Hold that a group of another number of workers goes on."""

    kind: ClassVar[str] = "resize"

    old: OldCount = None  #: workers before
    new: OldCount = None  #: workers now
    wanted: OldCount = None  #: workers that the stage wants
    seconds: OldAmount = None  #: from the last update of the old group to the first of the new one


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Event):
    """Hold the beginning of a stage, or that it goes on in other micro-batches."""

    kind: ClassVar[str] = "stage"

    epoch: Amount  #: passes over the training set
    stage: Count
    batch: Positive
    micro: Positive
    accum: Positive
    world: Positive
    lr: Amount
    momentum: OldAmount = None  #: of the optimizer, if it follows the batch
    beta2: OldAmount = None  #: the same
    weight_decay: OldAmount = None  #: the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Update(Event):
    """Hold an update: its shape, what it measured and what has been spent after it."""

    step: Count
    samples: Positive
    epoch: Above0
    stage: Count
    batch: Positive
    micro: OldCount
    accum: OldCount
    world: OldCount
    lr: Amount
    loss: Figure
    grad_norm: Figure
    grad_sq: OldFigure
    noise_trace: OldFigure
    noise_scale: OldFigure
    sfo: Count  # pyright: ignore[reportGeneralTypeIssues] an update's line always has it
    sfo_applied: OldCount
    sfo_skipped: OldCount
    sfo_replayed: OldCount
    sfo_discarded: OldCount
    sfo_probe: OldCount
    time_s: Amount
    samples_per_s: OldAmount
    tokens: OldCount = None  #: applied so far, if they are counted
    tokens_per_s: OldAmount = None
    mfu: OldAmount = None  #: share of the devices' peak FLOP/s that the model's FLOPs take, if both are known
    active: OldCount = None  #: experts that a token uses, if their number is scheduled
    compute: OldAmount = None  #: Σ b·density so far, in samples of the model with all weights, once it is less
    density: OldAmount = None  #: share of the kernels' weights that is left and that a token uses, once it is less
    delay: OldCount = None  #: updates after which the gradient is applied, if not at once; `lr` is the gradient's own
    sfo_extrapolated: OldCount = None  #: if any
    drawn: OldCount = None  #: samples of the update, if their number is random; `batch` is then its mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Update):
    """Hold an update that was applied."""

    kind: ClassVar[str] = "step"

    step: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip(Update):
    """Hold an update that was not applied: its gradient was not finite or came too late, or it counted no items."""

    kind: ClassVar[str] = "skip"

    empty: OldTruth = None  #: True: it counted no items
    late: OldTruth = None  #: True: its gradient came more updates late than engine.drop_after, and was dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory(Event):
    """Hold that a rank ran out of memory: the same batch comes again, in smaller micro-batches."""

    kind: ClassVar[str] = "oom"

    batch: OldCount = None
    micro: OldCount = None
    accum: OldCount = None
    world: OldCount = None
    sfo_discarded: OldCount = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Event):
    """Hold the metrics of the test set, which are the keys in `more`."""

    kind: ClassVar[str] = "eval"

    epoch: OldAmount = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that are finite numbers, by name."""
        numbers = {name: shown_number(value) for name, value in self.more.items() if name not in SPENT}
        return {name: value for name, value in numbers.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterNoise(Event):
    """Hold the smoothed noise of each parameter's gradient: `run.noise.by_parameter`."""

    kind: ClassVar[str] = "parameter_noise"

    names: Texts  #: the parameters'
    grad_sq: Figures  #: |∇f|² of each
    noise_trace: Figures  #: tr Σ of each

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.grad_sq) == len(self.noise_trace):
            raise ValueError("holds names, grad_sq and noise_trace of different lengths")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientProbe(Event):
    """Hold an exact measurement of the objective; what `run.probe.curvature` adds is in `more`."""

    kind: ClassVar[str] = "probe"

    epoch: OldAmount = None
    evaluations: OldCount = None  #: gradients that it took
    sfo_probe: OldCount = None
    norm: OldFigure = None  #: ‖∇f‖
    loss: OldFigure = None
    seconds: OldAmount = None

    def figure(self, name: str) -> float | None:
        """Return a figure in `more`, or None if it was not measured or is not finite."""
        return shown_number(self.more.get(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProbe(Event):
    """Hold a trial of a micro-batch: `max_micro: auto`."""

    kind: ClassVar[str] = "probe"

    micro: Count
    fits: Truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Event):
    """Hold that a checkpoint is complete."""

    kind: ClassVar[str] = "checkpoint"

    path: OldText = None  #: its name
    seconds: OldAmount = None  #: from the snapshot to the manifest
    stall_s: OldAmount = None  #: of these, the seconds that training waited


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceId(Event):
    """Hold the id by which services such as MLflow find the run again."""

    kind: ClassVar[str] = "tracker"

    id: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class End(Event):
    """Hold why the run ended: "done", "stopped on request", or what failed."""

    kind: ClassVar[str] = "end"

    reason: Text


Known = (
    Start | Resume | Rebudget | Resize | Stage | Step | Skip | OutOfMemory | Evaluation | ParameterNoise
    | GradientProbe | MemoryProbe | Branch | BranchTest | RateTrial | RateChoice | Checkpoint | ServiceId | End
)  # fmt: skip
#: The kinds of lines and their classes; a probe that says whether memory `fits` is a MemoryProbe.
KINDS: Mapping[str, type[Event]] = {kind.kind: kind for kind in reversed(get_args(Known))}
RESERVED = frozenset({"event", "step", "samples", "epoch", "sfo", "time_s"}) | SPENT  #: keys that are no metrics


def from_json(line: Any) -> Event:
    """Return the event that a line of metrics.jsonl holds.

    Raises:
        ValueError: it is no event, lacks a key, or holds a value of another kind.
    """
    if not isinstance(line, dict) or not line.keys() >= set(PLACE) or not isinstance(line["event"], str):
        raise ValueError(f"lacks one of {', '.join(PLACE)}")
    kind = KINDS.get(line["event"], Event)
    return (MemoryProbe if kind is GradientProbe and "fits" in line else kind).from_json(line)
