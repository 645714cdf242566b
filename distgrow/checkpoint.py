"""Checkpoints: atomic, verified folders of engine state and progress.json; knows no engine's format.

A checkpoint is written beside its place, flushed to the disk with the digests of its files, and renamed into place:
a killed write leaves nothing that loads. A checkpoint whose files do not match their digests is refused by name.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from distgrow.engine import Engine
from distgrow.progress import Progress
from distgrow.run import RunError, storing
from distgrow.world import World

_MANIFEST, _PROGRESS, _FACTS = "manifest.json", "progress.json", "facts.json"
_REPLACED = ".replaced"
_NAME = re.compile(r"step-(\d+)(\.replaced)?")


def save(
    folder: Path, engine: Engine, progress: Progress, *, keep: int, world: World, facts: Mapping[str, int] | None = None
) -> Path:
    """Write `folder`/step-…, then delete all but the newest `keep`. RunError on a full disk. Collective.

    `facts` are what a run must have in common with the one that goes on from here; see `compare`.
    """
    partial = world.once(lambda: _begin(folder))
    try:
        world.all(lambda: _write(engine, partial))
        final = world.once(lambda: _finish(partial, progress, facts or {}))
    finally:
        world.once(lambda: shutil.rmtree(partial, ignore_errors=True))
    world.once(lambda: clean(folder, keep=keep, current=final))
    return final


def _begin(folder: Path) -> Path:
    """A hidden folder to write into."""
    partial = folder / f".partial-{uuid.uuid4().hex[:8]}"
    with storing(folder):
        partial.mkdir(parents=True)
    return partial


def _write(engine: Engine, partial: Path) -> None:
    with storing(partial.parent):
        try:
            engine.save(partial)
        except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
            _raise_if_full(partial.parent, error)
            raise


def _finish(partial: Path, progress: Progress, facts: Mapping[str, int]) -> Path:
    """Progress and digests beside the engine's files, all on the disk, and the folder in its place."""
    folder = partial.parent
    final = folder / f"step-{progress.step:08d}"
    with storing(folder):
        (partial / _PROGRESS).write_text(json.dumps(progress.to_dict()))
        (partial / _FACTS).write_text(json.dumps(dict(facts)))
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        manifest = {str(file.relative_to(partial)): digest(file) for file in files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        if final.exists():  # the same step with more skipped updates; it counts until the new one is in its place
            replaced = final.with_name(final.name + _REPLACED)
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        _flush(folder)
    return final


def clean(folder: Path, *, keep: int, current: Path) -> None:
    """Delete what killed writes left, and all checkpoints before `current` but the newest `keep` − 1.

    Those after it are damaged ones that a resume has passed over: they stay, to be looked at.
    """
    older = [path for path in stored(folder) if _place(path) < _place(current)]
    whole = [path for path in older if not path.name.endswith(_REPLACED)]
    kept = whole[max(0, len(whole) - keep + 1) :]
    for stale in [*folder.glob(".partial-*"), *(path for path in older if path not in kept)]:
        hidden = stale if stale.name.startswith(".") else stale.with_name(f".partial-{stale.name}")
        if hidden != stale:
            shutil.rmtree(hidden, ignore_errors=True)
            stale.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _place(path: Path) -> tuple[int, bool]:
    """What checkpoints are sorted by: the step, and at one step the replaced one first."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2] is None


def stored(folder: Path) -> list[Path]:
    """All checkpoints, the oldest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_place)


def newest(folder: Path) -> tuple[Path, Progress, list[str]]:
    """The newest intact checkpoint, and what is wrong with each newer one. RunError where all are damaged."""
    damaged: list[str] = []
    for path in reversed(stored(folder)):
        damage = check(path)
        if damage is None:
            return path, Progress.from_dict(json.loads((path / _PROGRESS).read_text())), damaged
        damaged.append(f"{path.name}: {damage}")
    raise RunError(
        f"{folder} holds no intact checkpoint ({'; '.join(damaged) or 'none is there'}); "
        "start again in another run.dir, or restore the folder from a copy"
    )


def compare(path: Path, facts: Mapping[str, int]) -> None:
    """RunError where the run that wrote a checkpoint had other facts: it cannot go on with these."""
    before = json.loads((path / _FACTS).read_text()) if (path / _FACTS).is_file() else {}
    differing = [
        f"{before[name]:,} {name} then, {facts[name]:,} now"
        for name in facts
        if before.get(name, facts[name]) != facts[name]
    ]
    if differing:
        raise RunError(
            f"{path} was written with other data or another model: {'; '.join(differing)}; give it back its own"
        )


def check(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return f"{_MANIFEST} is missing or unreadable"
    if not isinstance(manifest, dict) or _PROGRESS not in manifest:
        return f"{_MANIFEST} is incomplete"
    for name, expected in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if digest(path / name) != expected:
            return f"{name} does not match its digest"
    return None


def digest(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_if_full(folder: Path, cause: Exception) -> None:
    """Repeat a write that torch could not do, so that the file system says why."""
    probe = folder / f".partial-{uuid.uuid4().hex[:8]}"
    try:
        with probe.open("wb") as stream:
            stream.write(b"\0" * (1 << 20))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise error from cause
    finally:
        probe.unlink(missing_ok=True)
