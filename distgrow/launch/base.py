"""LauncherSpec: what every launcher has, and Job, what a launcher knows of a run; starts no process itself."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self

from pydantic import BeforeValidator, Field, ValidationError

from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace, Seconds
from distgrow.core.scaling import Workers
from distgrow.core.spec import Spec
from distgrow.run.resume_mode import ResumeMode

if TYPE_CHECKING:
    from distgrow.engine.spec import EngineSpec
    from distgrow.growth.controller import Controller
    from distgrow.tracking.base import Tracker
    from distgrow.training.spec import RunSpec


class Job(Protocol):
    """A run as its launcher knows it. A config's Run is one."""

    @property
    def launch(self) -> "LauncherSpec":
        """Return how its ranks are started."""
        ...

    @property
    def engine(self) -> "EngineSpec":
        """Return what computes on each rank."""
        ...

    @property
    def run(self) -> "RunSpec":
        """Return where the run is kept."""
        ...

    def controller(self) -> "Controller":
        """Return what decides how many ranks each stage wants."""
        ...

    def fit(
        self,
        *,
        resume: ResumeMode,
        rebudget: bool = False,
        asked: int | None = None,
        trackers: "Sequence[Tracker]" = (),
    ) -> object:
        """Train as one rank of the group that this process is in. Collective: every rank must call."""
        ...

    def kept_in(self, path: str) -> Self:
        """Return the same run with another `run.dir`."""
        ...

    @classmethod
    def model_validate(cls, obj: Any, /) -> Self:
        """Return the run that `model_dump` was of."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the run as plain values, for another host."""
        ...


class LauncherSpec(Spec, ABC):
    """Hold the keys that all launchers have. A subclass gives `kind`, keys of its own, and `train`.

    No other module asks for a launcher's kind.
    """

    workers: Workers = 1
    """Number of ranks: 4, or from stage to stage {0: 1, 3: 4}, or within [1, 8] as many as full micro-batches need."""
    max_failures: Annotated[int, Field(ge=0)] = 0
    """How many failures of a group of workers a run survives. After each it resumes from its newest checkpoint."""
    backoff_s: Seconds = 1.0
    """Seconds to wait before a failed run resumes. They double with each further failure without a new checkpoint."""
    timeout_s: Annotated[float, Field(ge=1, le=10**7)] = 600.0
    """Seconds that a rank waits for the others before it fails and names the missing ones."""
    storage_path: str | None = None
    """URI of the storage for checkpoints, config and metrics (s3://…, gs://…, hdfs://…, file://…), in a folder of the
    run's name there. Default: run.dir, which every host must see."""
    pace: Pace | None = None
    """Speed of the run, if known. `plan` then prints seconds, worker-seconds and what resizing saves."""

    @property
    def elastic(self) -> bool:
        """Return whether the number of workers may change with the stage."""
        return not isinstance(self.workers, int)

    @abstractmethod
    def train(self, job: Job, *, resume: ResumeMode, rebudget: bool, command: Sequence[str]) -> int:
        """Start the ranks of a run whose folder is checked, and wait for their end.

        Args:
            job: The run.
            resume: Whether it is begun or resumed.
            rebudget: Whether a run that goes on with another budget may change what it has planned.
            command: Arguments of `python -m distgrow` by which a process becomes a rank of the run. Such a rank
                resumes the run if its folder holds one.

        Returns:
            The exit code of the command line.

        Raises:
            ConfigError: The ranks cannot be started so; or any other error for users of a rank.
        """


def skips_keys_of_others(*specs: type[Spec]) -> BeforeValidator:
    """Make a union of launchers skip keys that only another of them has, so that `kind` alone can be changed.

    A value that is skipped is still checked.
    """
    own = {spec.model_fields["kind"].default: spec.model_fields.keys() for spec in specs}
    owner_of = {key: spec for spec in specs for key in spec.model_fields}

    def without_others(values: Any) -> Any:
        kind = values.get("kind") if isinstance(values, dict) else None
        keys = own.get(kind) if isinstance(kind, str) else None
        if keys is None:
            return values
        skipped = values.keys() & owner_of.keys() - keys
        for key in skipped:
            _check_value(key, values[key], owner_of[key])
        return {key: value for key, value in values.items() if key not in skipped}

    return BeforeValidator(without_others)


def _check_value(key: str, value: Any, owner: type[Spec]) -> None:
    """Check a value by the launcher that has the key. Raise ConfigError if that one refuses it."""
    try:
        owner.model_validate({key: value})
    except ValidationError as error:
        raise ConfigError(f"{key}={value!r}: {error.errors()[0]['msg']}") from None
