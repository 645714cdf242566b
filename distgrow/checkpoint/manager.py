"""CheckpointManager: when a run's checkpoints are taken, how they are written in the background, how they are found."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgrow.checkpoint import writer
from distgrow.checkpoint.spec import Checkpointing
from distgrow.checkpoint.storage import Store
from distgrow.checkpoint.writer import Writing
from distgrow.core.errors import RunError
from distgrow.core.progress import Progress
from distgrow.core.spec import Spec
from distgrow.distributed.world import World
from distgrow.engine.spec import Engine
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder
from distgrow.tracking.base_event import Event
from distgrow.tracking.events import Checkpoint, End, Resume, Start
from distgrow.tracking.read import last_total, read_events


@contextmanager
def opened(
    folder: RunFolder,
    store: Store,
    world: World,
    settings: Mapping[str, Any],
    specs: Mapping[str, Spec],
    *,
    resume: bool | None,
) -> Iterator[bool]:
    """The run's folder is locked for as long as the context lasts; whether it holds a run to go on with. Collective."""
    world.on_rank0(lambda: folder.lock(wait_s=20 if resume is None else 0))  # a killed group may still be ending
    try:
        world.on_rank0(lambda: store.pull(folder, resume=resume))
        begun = world.on_rank0(folder.begun) if resume is None else resume
        world.on_rank0(lambda: folder.reopen(settings, specs) if begun else folder.create(settings))
        yield begun
        world.on_rank0(lambda: store.push(folder))
    finally:
        folder.unlock()


def stands_at(store: Store) -> Progress:
    """Return where a run would be resumed: the progress of its newest intact checkpoint, or of a new run."""
    return writer.newest(store)[1] if store.names() else Progress()


#: What back_off waits at most, in first waits.
LONGEST = 64


def back_off(folder: RunFolder, first_s: float) -> None:
    """Wait before a failed run goes on: `first_s`, and twice as long for each failure since its last checkpoint."""
    if resize_request.pending(folder):
        return  # the group before has not failed, it has made room for this one
    if count := failures(read_events(folder.metrics)):
        time.sleep(first_s * min(2 ** (count - 1), LONGEST))


def failures(events: Iterable[Event]) -> int:
    """How often a run has failed since its last checkpoint, if it ended after these events."""
    count = 0
    for event in events:
        begun = isinstance(event, Start | Checkpoint)
        count = 1 if begun else 0 if isinstance(event, End) else count + isinstance(event, Resume)
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The checkpoint that a run goes on from."""

    name: str
    progress: Progress
    lost: int  #: gradient evaluations beyond it, which the progress is charged with
    damaged: list[str]  #: what is wrong with newer ones
    seconds: float  #: that the run had taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A checkpoint that has been written."""

    name: str
    progress: Progress
    seconds: float  #: from the snapshot to the manifest
    stall_s: float  #: of these, the seconds that training waited


class CheckpointManager:
    """The checkpoints of one run under way; every method but `due` and `writing` is collective."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        folder: RunFolder,
        spec: Checkpointing,
        world: World,
        facts: Mapping[str, int],
    ) -> None:
        self._store, self._engine, self._folder, self._spec = store, engine, folder, spec
        self._world, self._facts = world, facts
        self._saved_at, self._saved = time.monotonic(), Progress()
        self._asked = False  # somebody has, since the last one was begun
        self._written = False  # whether a checkpoint holds `_saved`
        self._charged = 0  # SFO total that these processes did not evaluate themselves
        self._stalled = 0.0
        self.current: Writing | None = None  #: the checkpoint under way, begun on every rank

    def due(self, progress: Progress, *, asked: bool = False) -> bool:
        """This rank's wish to checkpoint after the coming update, or somebody's; one rank's wish is enough."""
        self._asked = self._asked or asked
        steps = self._spec.every_steps
        by_steps = steps is not None and progress.step + 1 - self._saved.step >= steps
        return self._asked or by_steps or time.monotonic() - self._saved_at >= self._spec.every_s

    def writing(self) -> bool:
        """Whether this rank is still writing."""
        return self.current is not None and self.current.under_way()

    def begin(self, progress: Progress) -> None:
        """Compare the ledger with what the ranks really did, then copy the state and begin to write it."""
        began = time.monotonic()
        evaluated = int(self._world.sum([self._engine.evaluations])[0])
        if evaluated != progress.ledger.total - self._charged:
            raise RuntimeError(
                f"the ranks evaluated {evaluated} gradients but the ledger holds "
                f"{progress.ledger.total - self._charged}: does the data set or collate drop or add rows?"
            )
        self.current = Writing(
            self._store, self._engine, progress, keep=self._spec.keep, world=self._world, facts=self._facts,
            beside=lambda: self._store.push(self._folder),
        )  # fmt: skip
        self._saved_at, self._saved, self._written, self._asked = began, progress, True, False
        self._stalled = time.monotonic() - began

    def settle(self) -> Kept | None:
        """Go on with the checkpoint under way once no rank is writing, for which it waits: it, when it is one."""
        assert self.current is not None
        waited, writing = time.monotonic(), self.current
        self.current = None  # unless it goes on: after a failure it is over
        whole = writing.settle()
        now = time.monotonic()
        self._stalled += now - waited
        if not whole:
            self.current = writing
            return None
        seconds = now - writing.began
        return Kept(name=writing.name, progress=writing.progress, seconds=seconds, stall_s=self._stalled)

    def saved(self, progress: Progress) -> bool:
        """Whether this very progress has been saved."""
        return self._written and progress == self._saved

    def find(self) -> Found | None:
        """Load the newest intact checkpoint; None where no checkpoint was ever written."""
        found = self._world.on_rank0(self._look)
        if found is None:
            return None
        path = self._world.on_all_ranks(lambda: self._fetched(found.name))
        self._engine.load(path)
        self._world.on_rank0(lambda: writer.clean(self._store, keep=self._spec.keep, current=found.name))
        self._charged, self._saved = found.progress.ledger.total, found.progress
        self._written = not found.lost
        return found

    def _fetched(self, name: str) -> Path:
        """The checkpoint on this rank's host, where it must be intact too."""
        path = self._store.fetch(name)
        if self._world.rank > 0 and (damage := writer.check(path)):
            raise RunError(f"{path}, as rank {self._world.rank} sees it: {damage}; look at that host's disk or network")
        return path

    def _look(self) -> Found | None:
        events = list(read_events(self._folder.metrics))
        if not self._store.names() and not any(isinstance(event, Checkpoint) for event in events):
            return None
        name, progress, damaged = writer.newest(self._store)
        writer.compare(Path(self._store.fetch(name)), self._facts)
        lost = max(0, last_total(events) - progress.ledger.total)
        seconds = max((event.time_s for event in events), default=0.0)
        return Found(name=name, progress=progress.replaying(lost), lost=lost, damaged=damaged, seconds=seconds)
