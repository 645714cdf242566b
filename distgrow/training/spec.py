"""Where a run is kept and what it does beside training, as a config says it."""

from typing import Annotated

from pydantic import AfterValidator, Field

from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.noise_stats import Measuring
from distgrow.core.probe_schedule import Probing
from distgrow.core.spec import PosFloat, PosInt, Spec
from distgrow.data.spec import Loading
from distgrow.distributed.environment import expanded
from distgrow.tracking.spec import TrackerSpecs


class Evaluation(Spec):
    """When the test set is evaluated. Always at the end."""

    every_epochs: PosFloat = 1.0
    """Epochs between two evaluations."""
    rows: PosInt = 256
    """Rows of an evaluation batch."""


class RunSpec(Spec):
    """Where a run is kept, and its habits."""

    dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$"), AfterValidator(expanded)] = "runs/run"
    """The run's folder. ~ and $NAMES of the environment are replaced."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of parameters, data order, augmentation and dropout."""
    checkpoint: Checkpointing = Checkpointing()
    """When checkpoints are written."""
    eval: Evaluation = Evaluation()
    """When the test set is evaluated."""
    probe: Probing = Probing()
    """When the full gradient is measured exactly."""
    loader: Loading = Loading()
    """How samples are loaded."""
    noise: Measuring = Measuring()
    """How gradient noise is measured."""
    trackers: TrackerSpecs = []
    """Services to report to, beside metrics.jsonl: wandb, mlflow."""
    log_every: PosInt = 1
    """Updates between two step lines of metrics.jsonl."""
    max_skips: PosInt = 20
    """Non-finite updates in a row after which the run stops."""
