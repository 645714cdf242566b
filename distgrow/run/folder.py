"""A run's folder: its spec, its lock, its recorded settings, its files' names, requests to stop; knows no training."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from filelock import FileLock, Timeout
from pydantic import Field

from distgrow.core.noise_stats import Measuring
from distgrow.core.probe_schedule import Probing
from distgrow.core.spec import ConfigError, PosFloat, PosInt, Spec
from distgrow.tracking.spec import TrackerSpecs


class RunError(ConfigError):
    """Something that the user can put right keeps a run from starting or going on; nothing is lost."""


class TrainingFailed(Exception):
    """The training itself cannot go on; the last checkpoint is good."""


class Diverged(TrainingFailed):
    """Too many updates in a row were not finite, on every rank."""


class Checkpointing(Spec):
    """When checkpoints are written. One is always written at the end and on SIGTERM."""

    every_s: PosFloat = 60.0
    """Seconds between two checkpoints, at most (the work that a crash can lose)."""
    every_steps: PosInt | None = None
    """Also every so many updates."""
    keep: PosInt = 3
    """How many to keep, the newest."""


class Evaluation(Spec):
    """When the test set is evaluated. Always at the end."""

    every_epochs: PosFloat = 1.0
    """Epochs between two evaluations."""
    rows: PosInt = 256
    """Rows of an evaluation batch."""


class Loading(Spec):
    """How samples are loaded."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes of each rank; 0 loads in the training process."""
    prefetch: PosInt = 4
    """Micro-batches that each loader process draws ahead."""


class RunSpec(Spec):
    """Where a run is kept, and its habits."""

    dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")] = "runs/run"
    """The run's folder."""
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


class _Dumper(yaml.SafeDumper):
    """YAML that loads as it was written: unquoted, PyYAML would fold some line breaks of Unicode into spaces."""


_Dumper.add_representer(
    str, lambda to, text: to.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')
)


class RunFolder:
    """The files of one run. Only the first rank makes changes here."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.ray = self.path / ".ray"
        self.stop = self.path / ".stop"  #: touched by who wants the run to checkpoint and end
        self.checkpoint = self.path / ".checkpoint"  #: touched by who wants a checkpoint soon
        self._lock = FileLock(self.path / ".lock")

    def begun(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def endings(self) -> int:
        """How often the run here has come to an end, its checkpoint written."""
        if not self.metrics.is_file():
            return 0
        return self.metrics.read_text(encoding="utf-8", errors="replace").count('"event": "end"')

    def check(self, *, resume: bool) -> None:
        """RunError where there is no run to resume, or where a new one would overwrite something."""
        with storing(self.path):
            if resume and not self.begun():
                raise RunError(f"run.dir={self.path} holds no run to resume; start it without --resume")
            taken = self.path.exists() and any(not file.name.startswith(".") for file in self.path.iterdir())
            if taken and not resume:
                raise RunError(
                    f"run.dir={self.path} exists already and is never overwritten: "
                    "continue it with --resume, or choose another run.dir"
                )

    def create(self, settings: Mapping[str, Any]) -> None:
        """Make the folder for a new run; RunError where it holds one already."""
        self.check(resume=False)
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            partial = self.path / ".config.yaml"  # hidden: a folder that could not be begun can be begun again
            partial.write_text(
                yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
            partial.replace(self.config)
            self.checkpoints.mkdir(exist_ok=True)

    def reopen(self, settings: Mapping[str, Any]) -> None:
        """Check that the folder holds a run with these settings; RunError names every key that differs."""
        self.check(resume=True)
        try:
            before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{self.config} is damaged: {error}; restore it from a copy") from None
        if not isinstance(before, dict):
            raise RunError(f"{self.config} is damaged: it holds {before!r}, no mapping of keys; restore it from a copy")
        differing = [f"{key}: {old!r} in the folder, {new!r} now" for key, old, new in differences(before, settings)]
        if differing:
            raise RunError(
                f"run.dir={self.path} was started with another config; set these back or choose another run.dir:\n  "
                + "\n  ".join(differing)
            )

    def lock(self, wait_s: float = 0) -> None:
        """Keep everybody else from writing here until `unlock`; RunError where somebody writes for `wait_s` more."""
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=wait_s)
            except Timeout:
                raise RunError(
                    f"run.dir={self.path} is being written by another process; wait for it, end it after a checkpoint "
                    f"with 'touch {self.stop}', or choose another run.dir"
                ) from None

    def request_stop(self) -> None:
        """Ask the run that is writing here to checkpoint and end; for who cannot send it SIGTERM."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.stop.touch()

    def stop_requested(self) -> bool:
        """Whether somebody has asked; the request is used up."""
        return _take(self.stop)

    def checkpoint_requested(self) -> bool:
        """Whether somebody has asked for a checkpoint; the request is used up."""
        return _take(self.checkpoint)

    def unlock(self) -> None:
        """Let others write here again."""
        self._lock.release()


def _take(request: Path) -> bool:
    if not request.exists():
        return False
    request.unlink(missing_ok=True)
    return True


class StopRequests:
    """Whether SIGTERM has come, or somebody asked through the run's folder (looked at once a second)."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._signalled, self._next_look = folder, threading.Event(), 0.0
        self._checkpoint = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + 1.0
            self._checkpoint = self._folder.checkpoint_requested()
            if self._folder.stop_requested():
                self._signalled.set()
        return self._signalled.is_set()

    def checkpoint(self) -> bool:
        """Whether the last look has found that somebody asked for a checkpoint; told once."""
        asked, self._checkpoint = self._checkpoint, False
        return asked

    @contextmanager
    def watched(self) -> Iterator[None]:
        """SIGTERM's usual effect is held back meanwhile; in a thread (as in a Ray worker) it cannot be caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self._signalled.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


#: Keys that may change on resume: they decide where and how fast a run goes on, not what it computes.
FREE = ("launch", "theory", "engine.max_micro", "engine.device", "engine.compile", "engine.bucket_mb", "run")
BOUND = ("run.seed", "run.noise")


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys (dotted) with other values, among those that decide what is computed."""
    old, new = flatten(before), flatten(after)
    keys = [key for key in {**old, **new} if _under(key, BOUND) or not _under(key, FREE)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings → one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


_STORAGE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "choose a run.dir that can be written",
    errno.EACCES: "choose a run.dir that can be written",
    errno.EPERM: "choose a run.dir that can be written",
    errno.ENOENT: "choose a run.dir in a folder that exists or can be made",
    errno.ENOTDIR: "choose a run.dir whose parents are folders",
    errno.EEXIST: "choose a run.dir that is a folder",
    errno.EISDIR: "choose a run.dir that is free",
    errno.ENAMETOOLONG: "choose a shorter run.dir",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EIO: "look at the disk or its network",
}


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into a RunError that names the path and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        reason = os.strerror(error.errno or 0)
        remedy = _STORAGE[error.errno or 0]
        raise RunError(
            f"cannot write to {path}: {reason}; {remedy}. Checkpoints written before stay good for --resume"
        ) from error
