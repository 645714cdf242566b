"""Checkpoints: atomic, verified sets of files that hold engine state and progress; knows no engine's format.

Training waits while the state is copied, and continues while it is written. When every rank's files are durable, a
manifest with their digests makes them a checkpoint. So a killed write leaves nothing that loads. A checkpoint whose
files do not match their digests is refused by name.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distgrow.checkpoint.storage import MANIFEST, Store, at, free_name
from distgrow.core.errors import RunError
from distgrow.core.progress import Progress
from distgrow.distributed.world import World
from distgrow.engine.protocol import Engine

_PROGRESS, _FACTS, _KEPT = "progress.json", "facts.json", "kept.json"


class CheckpointWrite:
    """Write a checkpoint in the background: a thread on each rank writes files, then one on rank 0 the manifest."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        progress: Progress,
        *,
        keep: int,
        world: World,
        facts: Mapping[str, int] | None = None,
        kept: Mapping[str, int] | None = None,
        beside: Callable[[], None] = lambda: None,
        more: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copy the engine's state and begin to write it. Collective: every rank must call.

        Args:
            store: The storage of the checkpoints.
            engine: Gives the state.
            progress: The record at this moment.
            keep: How many checkpoints to keep, this one included. Older ones are deleted.
            world: The ranks.
            facts: Numbers that a run must share with the one that resumes from here; see `compare`.
            kept: Steps whose checkpoints are kept however many are newer, by the names that they are kept by.
            beside: Called in rank 0's thread as well.
            more: Files of this rank beside the engine's.
        """
        self.progress, self.began = progress, time.monotonic()
        self._store, self._world, self._keep, self._kept = store, world, keep, dict(kept or {})
        files = {**world.on_all_ranks(engine.snapshot), **(more or {})}
        if world.rank == 0:
            if self._kept:
                files[_KEPT] = json.dumps(self._kept).encode()
            files[_PROGRESS] = json.dumps(progress.to_dict()).encode()
            files[_FACTS] = json.dumps(dict(facts or {})).encode()
        self.name, self._place = world.on_rank0(self._begin)
        self._digests: dict[str, str] = {}
        self._gathered = False
        self._failure: Exception | None = None
        self._start(lambda: self._write(files), beside if world.rank == 0 else lambda: None)

    def under_way(self) -> bool:
        """Return True if this rank is still writing."""
        return self._thread.is_alive()

    def settle(self) -> bool:
        """Wait until no rank is writing, then begin the next of two steps. Collective: every rank must call.

        Returns:
            False after the ranks' files: the manifest is being written. True once the manifest is there too.

        Raises:
            RunError: A file could not be written.
        """
        self._thread.join()
        try:
            self._world.on_all_ranks(self._raise_failure)
            if self._gathered:
                return True
            digests = {file: digest for part in self._world.gather(self._digests) for file, digest in part.items()}
        except Exception:
            if not self._gathered:  # if gathered, it may be a checkpoint already
                self._world.on_rank0(lambda: self._store.delete(self._place))
            raise
        self._gathered = True
        if self._world.rank == 0:
            manifest = json.dumps(dict(sorted(digests.items())), indent=1).encode()
            self._start(lambda: self._store.commit(self._place, self.name, manifest), self._clean)
        return False

    def _begin(self) -> tuple[str, str]:
        name = free_name(self.progress.step, self._store.names())
        return name, self._store.begin(name)

    def _start(self, *tasks: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._work, args=(tasks,), daemon=True, name="checkpoint")
        self._thread.start()

    def _work(self, tasks: Sequence[Callable[[], None]]) -> None:
        try:
            for task in tasks:
                task()
        except Exception as error:  # settle raises it on every rank
            self._failure = error

    def _write(self, files: Mapping[str, bytes]) -> None:
        for file, data in files.items():
            self._store.write(self._place, file, data)
            self._digests[file] = hashlib.sha256(data).hexdigest()

    def _clean(self) -> None:
        clean(self._store, keep=self._keep, current=self.name, kept=self._kept)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def save(
    store: Store, engine: Engine, progress: Progress, *, keep: int, world: World, facts: Mapping[str, int] | None = None
) -> str:
    """Write a checkpoint, wait until it is complete, and return its name. Collective: every rank must call."""
    writing = CheckpointWrite(store, engine, progress, keep=keep, world=world, facts=facts)
    while not writing.settle():
        continue
    return writing.name


def clean(store: Store, *, keep: int, current: str, kept: Mapping[str, int] | None = None) -> None:
    """Delete the remains of killed writes, and checkpoints before `current`.

    The newest `keep` − 1 checkpoints of earlier steps stay, and the newest one of each step in `kept`. Checkpoints
    after `current` stay, too: they are damaged ones that a resume has passed over, and somebody may want to look at
    them.
    """
    store.sweep()
    before = [name for name in store.names() if at(name) < at(current)]
    older = [name for name in before if at(name)[0] < at(current)[0]]  # the rest is superseded
    stay = set(older[max(0, len(older) - keep + 1) :]) | {of_step(older, step) for step in (kept or {}).values()}
    for name in before:
        if name not in stay:
            store.delete(name)


def of_step(names: Sequence[str], step: int) -> str | None:
    """Return the newest of the checkpoints of a step, or None if there is none."""
    return max((name for name in names if at(name)[0] == step), key=at, default=None)


def kept(path: Path) -> dict[str, int]:
    """Return the steps whose checkpoints are kept, by name, as a checkpoint records them."""
    file = path / _KEPT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def newest(store: Store) -> tuple[str, Progress, list[str]]:
    """Return the name of the newest intact checkpoint, its progress, and the damage of each newer one.

    Raises:
        RunError: No checkpoint is intact.
    """
    damaged: list[str] = []
    for name in reversed(store.names()):
        path = store.fetch(name)
        damage = check(path)
        if damage is None:
            return name, Progress.from_dict(json.loads((path / _PROGRESS).read_text())), damaged
        damaged.append(f"{name}: {damage}")
    raise RunError(
        f"{store.where} holds no intact checkpoint ({'; '.join(damaged) or 'none is there'}); "
        "start again in another run.dir, or restore the folder from a copy"
    )


def compare(path: Path, facts: Mapping[str, int]) -> None:
    """Check that the run that wrote a checkpoint had the same facts.

    Raises:
        RunError: A fact differs, so the run cannot be resumed with the present ones.
    """
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
    """Return the damage of a checkpoint's files in words. Return None if they are intact."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    if not isinstance(manifest, dict) or _PROGRESS not in manifest:
        return f"{MANIFEST} is incomplete"
    for name, expected in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if digest(path / name) != expected:
            return f"{name} does not match its digest"
    return None


def digest(file: Path) -> str:
    """Return the SHA-256 digest of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
