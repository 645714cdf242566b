"""RunFolder: the files of one run, its lock, and its recorded settings."""

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from distgrow.core.errors import ConfigError, RunError
from distgrow.core.spec import Spec, as_today
from distgrow.core.yaml_text import plain, read_file
from distgrow.run.resume_check import PLANNED, differences, under, with_measured_rate
from distgrow.run.resume_mode import ResumeMode


class _Dumper(yaml.SafeDumper):
    """Dump YAML so that it loads unchanged.

    Without quotes, PyYAML would fold some line breaks of Unicode into spaces.
    """


_Dumper.add_representer(
    str, lambda to, text: to.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')
)


class RunFolder:
    """Own the files of one run. Only rank 0 changes them here."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.samples = self.path / "samples.jsonl"  #: what the model has made, such as texts
        self.pretrained = self.path / "pretrained"  #: config and tokenizer of a Hugging Face model
        self.ray = self.path / ".ray"
        self.stop = self.path / ".stop"  #: somebody creates it to make the run checkpoint and end
        self.checkpoint = self.path / ".checkpoint"  #: somebody creates it to get a checkpoint soon
        self._lock = FileLock(self.path / ".lock")

    def begun(self) -> bool:
        """Return True if the folder holds a run."""
        with storing(self.path):
            return self.config.is_file()

    def endings(self) -> int:
        """Return how many times the run here has ended with its checkpoint written."""
        if not self.metrics.is_file():
            return 0
        return self.metrics.read_text(encoding="utf-8", errors="replace").count('"event": "end"')

    def check(self, *, resume: bool) -> None:
        """Check that a run can be resumed here or, without `resume`, that a new one would overwrite nothing.

        Raises:
            RunError: There is no run to resume, or the folder holds files already.
        """
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
        """Make the folder for a new run.

        Raises:
            RunError: The folder holds a run or other files.
        """
        self.check(resume=False)
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._record(settings)
            self.checkpoints.mkdir(exist_ok=True)

    def _record(self, settings: Mapping[str, Any]) -> None:
        """Write config.yaml, as a whole or not at all."""
        partial = self.path / ".config.yaml"  # hidden, so that `check` allows a second attempt if this one fails
        partial.write_text(
            yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # as it may replace the only record of the run
        partial.replace(self.config)

    def reopen(
        self,
        settings: Mapping[str, Any],
        specs: Mapping[str, Spec] | None = None,
        rebudget: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> bool:
        """Check that the folder holds a run with these settings, or with another budget that `rebudget` lets change.

        Args:
            settings: The config of the present run.
            specs: The typed sections of `settings`. The recorded sections are read through them, since an older version
                may have written kinds and keys under other names.
            rebudget: Called with the recorded budget if the present one is another, before config.yaml is rewritten.
                None: the budget may not change.

        Returns:
            Whether config.yaml was rewritten.

        Raises:
            RunError: The folder holds no run, or a run with other settings. The message names every key that differs.
        """
        self.check(resume=True)
        try:
            before = plain(read_file(self.config))
        except ConfigError as error:
            raise RunError(f"{self.config} is damaged: {error}; restore it from a copy") from None
        if not isinstance(before, dict):
            raise RunError(f"{self.config} is damaged: it holds {before!r}, no mapping of keys; restore it from a copy")
        today = before | {name: as_today(before[name], spec) for name, spec in (specs or {}).items() if name in before}
        found = differences(with_measured_rate(today, settings), settings)
        refused = found if rebudget is None else [entry for entry in found if not under(entry[0], PLANNED)]
        if refused:
            differing = [f"{key}: {old!r} in the folder, {new!r} now" for key, old, new in refused]
            raise RunError(
                f"run.dir={self.path} was started with another config; set these back or choose another run.dir:\n  "
                + "\n  ".join(differing)
            )
        if found and rebudget is not None:
            rebudget(today["budget"])
            with storing(self.path):
                self._record({**before, "budget": settings["budget"]})
        return bool(found)

    def record_section(self, name: str, section: Any) -> None:
        """Write config.yaml anew, with another section of this name."""
        with storing(self.path):
            self._record({**plain(read_file(self.config)), name: section})

    def lock(self, wait_s: float = 0) -> None:
        """Exclude other writers from this folder until `unlock`.

        Raises:
            RunError: Another process still writes here after `wait_s` seconds.
        """
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
        """Ask the run that writes here to checkpoint and end. Use it if SIGTERM cannot be sent."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.stop.touch()

    def stop_requested(self) -> bool:
        """Return True if somebody has requested a stop. This deletes the request."""
        return _take(self.stop)

    def checkpoint_requested(self) -> bool:
        """Return True if somebody has requested a checkpoint. This deletes the request."""
        return _take(self.checkpoint)

    def unlock(self) -> None:
        """Allow other writers again."""
        self._lock.release()


def numbered(pattern: str, *, resume: ResumeMode, name: str) -> str:
    """Return `run.dir` with {name} replaced, and {n} replaced by the number of a run.

    Args:
        pattern: `run.dir`.
        resume: START takes the next free number. The other modes take that of the newest run, or 1 if there is none.
        name: The replacement of {name}.
    """
    before, n, after = pattern.replace("{name}", name).partition("{n}")
    if not n:
        return before
    last = Path(before + "x")
    shape = re.compile(re.escape(last.name[:-1]) + r"(\d+)" + re.escape(after.partition("/")[0]))
    with storing(last.parent):
        entries = [entry.name for entry in last.parent.iterdir()] if last.parent.is_dir() else []
    newest = max((int(match[1]) for match in map(shape.fullmatch, entries) if match), default=0)
    return f"{before}{newest + (resume is ResumeMode.START or newest == 0)}{after}"


def _take(request: Path) -> bool:
    if not request.exists():
        return False
    request.unlink(missing_ok=True)
    return True


_STORAGE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "choose a {key} that can be written",
    errno.EACCES: "choose a {key} that can be written",
    errno.EPERM: "choose a {key} that can be written",
    errno.ENOENT: "choose a {key} in a folder that exists",
    errno.ENOTDIR: "choose a {key} whose parents are folders",
    errno.EEXIST: "choose a {key} that is a folder",
    errno.EISDIR: "choose a {key} that is free",
    errno.ENAMETOOLONG: "choose a shorter {key}",
    errno.ELOOP: "choose a {key} whose links lead somewhere",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EIO: "look at the disk or its network",
}


@contextmanager
def storing(path: Path, key: str = "run.dir") -> Iterator[None]:
    """Turn errors of the file system into one that names the path and a remedy.

    Args:
        path: What is written.
        key: The key of a config, or the option of a command, that says where.

    Raises:
        RunError: The file system refused an operation inside the context.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        reason = os.strerror(error.errno or 0)
        remedy = _STORAGE[error.errno or 0].format(key=key)
        kept = ". Checkpoints written before stay good for --resume" if key == "run.dir" else ""
        place = path if key == "run.dir" else f"{key}={path}"
        raise RunError(f"cannot write to {place}: {reason}; {remedy}{kept}") from error
