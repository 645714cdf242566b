"""CheckpointManager: when a run's checkpoints are taken, written in the background, and loaded again."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from distgrow.checkpoint import writer
from distgrow.checkpoint.beside import Beside, Nothing
from distgrow.checkpoint.spec import Checkpointing
from distgrow.checkpoint.storage import Store
from distgrow.checkpoint.writer import CheckpointWrite
from distgrow.core.errors import RunError
from distgrow.core.progress import Progress
from distgrow.core.spec import Spec
from distgrow.distributed.world import World
from distgrow.engine.protocol import Engine
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder
from distgrow.run.resume_mode import ResumeMode
from distgrow.tracking.base_event import Event
from distgrow.tracking.event_log import EventLog
from distgrow.tracking.events import Checkpoint, End, Evaluation, Rebudget, Resume, Start
from distgrow.tracking.read import chosen_rate, history, last_total, read_events


@contextmanager
def opened(
    folder: RunFolder,
    store: Store,
    world: World,
    settings: Mapping[str, Any],
    specs: Mapping[str, Spec],
    *,
    resume: ResumeMode,
    rebudget: Callable[[Mapping[str, Any]], None] | None = None,
) -> Iterator[bool]:
    """Lock the run's folder inside the context, and yield whether it holds a run to resume.

    Collective: every rank must call.

    Args:
        folder: The run's folder.
        store: The storage of its checkpoints.
        world: The ranks.
        settings: What config.yaml records of the run.
        specs: The specs among them, by their keys.
        resume: Whether the run is begun or resumed.
        rebudget: Lets the run go on with another budget; see `RunFolder.reopen`.
    """
    patience_s = 20 if resume is ResumeMode.EITHER else 0  # a killed group may still be ending
    world.on_rank0(lambda: folder.lock(wait_s=patience_s))
    try:
        world.on_rank0(lambda: store.pull(folder, resume=resume))
        begun = resume.resumes(lambda: world.on_rank0(folder.begun))
        if not begun:
            world.on_rank0(lambda: folder.create(settings))
        elif world.on_rank0(lambda: folder.reopen(settings, specs, rebudget)):
            world.on_rank0(lambda: store.push(folder))
        yield begun
        world.on_rank0(lambda: store.push(folder))
    finally:
        folder.unlock()


def stands_at(store: Store) -> Progress:
    """Return where a run would be resumed: the progress of its newest intact checkpoint, or of a new run."""
    return writer.newest(store)[1] if store.names() else Progress()


#: The longest wait of back_off, in first waits.
LONGEST = 64


def back_off(folder: RunFolder, first_s: float) -> None:
    """Wait before a failed run is resumed: `first_s`, and twice as long for each failure since its last checkpoint."""
    if resize_request.pending(folder):
        return  # the last group of ranks did not fail: it ended for one of another size
    if count := failures(read_events(folder.metrics)):
        time.sleep(first_s * min(2 ** (count - 1), LONGEST))


def failures(events: Iterable[Event]) -> int:
    """Count how often a run has failed since its last checkpoint, if it ended after these events."""
    count = 0
    for event in events:
        begun = isinstance(event, Start | Checkpoint)
        count = 1 if begun else 0 if isinstance(event, End) else count + isinstance(event, Resume)
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Hold the checkpoint that a run is resumed from."""

    name: str
    progress: Progress
    lost: int  #: gradient evaluations beyond it, which the progress is charged with
    damaged: list[str]  #: what is wrong with newer ones
    seconds: float  #: that the run had taken
    evaluated: tuple[int, int]  #: (step, samples) of the newest evaluation of the test set up to it; (0, 0): none


class DataState(Protocol):
    """Give the files of a checkpoint that hold where the training set stands, and take them back."""

    def files(self) -> dict[str, bytes]:
        """Return the files by name. Collective: every rank must call."""
        ...

    def restore(self, checkpoint: Path) -> None:
        """Go on from the checkpoint in a folder."""
        ...


class CheckpointManager:
    """Manage the checkpoints of one run. Every method but `due` and `writing` is collective."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        folder: RunFolder,
        spec: Checkpointing,
        world: World,
        events: EventLog,
        facts: Mapping[str, int],
        data: DataState | None = None,
        beside: Beside | None = None,
    ) -> None:
        self._store, self._engine, self._folder, self._spec = store, engine, folder, spec
        self._world, self._events, self._facts, self._data = world, events, facts, data
        self._beside = beside or Nothing()
        self._begun_at = time.monotonic()  # when the newest checkpoint was begun
        self._newest: tuple[Progress, Any] | None = None  # what a checkpoint holds or will hold
        self._kept: dict[str, int] = {}  # steps whose checkpoints are kept, by their names
        self._step = self._samples = 0  # of the newest checkpoint
        self._requested = False  # a checkpoint has been requested since the newest was begun
        self._old_votes = 0  # updates whose votes were cast before that
        self._keeps = False  # a checkpoint is to be written, as it is kept by a name
        self._charged = 0  # evaluations of the ledger that these processes did not make themselves
        self._stall_s = 0.0
        self._writer: CheckpointWrite | None = None  # begun on every rank, not yet whole

    def due(self, progress: Progress, *, batch: int = 0, requested: bool = False) -> bool:
        """Return whether this rank wants a checkpoint after the coming update. One rank's wish is enough.

        Args:
            progress: The progress before the update.
            batch: Its samples.
            requested: Whether somebody has asked for a checkpoint.
        """
        self._requested = self._requested or requested
        steps, updates = self._spec.every_steps, 1 + self._engine.ahead  # until the wish is known
        by_steps = steps is not None and progress.step + updates - self._step >= steps
        samples = self._spec.every_samples
        by_samples = samples is not None and progress.samples + updates * batch - self._samples >= samples
        return self._requested or by_steps or by_samples or time.monotonic() - self._begun_at >= self._spec.every_s

    def writing(self) -> bool:
        """Return whether this rank is still writing."""
        return self._writer is not None and self._writer.under_way()

    def after(self, progress: Progress, *, due: bool, writing: bool) -> None:
        """Go on with checkpoints after an update.

        A checkpoint that takes longer than the interval is waited for: a crash loses two intervals at most.

        Args:
            progress: The progress after the update.
            due: Whether any rank wants a checkpoint of `progress`.
            writing: Whether any rank was still writing before the update.
        """
        old, self._old_votes = self._old_votes, 0
        if old:  # the votes are from before the newest checkpoint was begun
            due, writing = False, True
        if self._writer and not writing:
            self._settle()
        if due or self._keeps:
            self._wait()
            self._begin(progress)

    def save(self, progress: Progress) -> Progress:
        """Write a checkpoint of `progress`, if none holds it, and wait until it is whole. Return `progress`."""
        self._wait()
        if (progress, self._beside.version) != self._newest or self._keeps:
            self._begin(progress)
            self._wait()
        return progress

    def outdate(self) -> None:
        """Have `save` write a checkpoint even of a progress that one holds: the engine has moved since."""
        self._newest = None

    def keep(self, progress: Progress, names: Sequence[str]) -> None:
        """Have a checkpoint of `progress` written soon that is kept by `names`, in place of those that had them."""
        if names:
            self._keeps = True
            self._kept |= dict.fromkeys(names, progress.step)

    def _wait(self) -> None:
        while self._writer:
            self._settle()

    def _begin(self, progress: Progress) -> None:
        """Compare the ledger with what the ranks really did, then copy the state and begin to write it."""
        began = time.monotonic()
        evaluated = int(self._world.sum([self._engine.evaluations])[0])
        if evaluated != progress.ledger.total - self._charged:
            raise RuntimeError(
                f"the ranks evaluated {evaluated} gradients but the ledger holds "
                f"{progress.ledger.total - self._charged}: does the data set or collate drop or add rows?"
            )
        files = self._beside.before_checkpoint(progress)
        self._events.flush()  # whoever resumes from the checkpoint finds every line from before it
        self._writer = CheckpointWrite(
            self._store, self._engine, progress, keep=self._spec.keep, kept=self._kept, world=self._world,
            facts=self._facts, beside=lambda: self._store.push(self._folder),
            more={**files, **(self._data.files() if self._data else {})},
        )  # fmt: skip
        self._begun_at, self._newest = began, (progress, self._beside.version)
        self._step, self._samples = progress.step, progress.samples
        self._requested = self._keeps = False
        self._old_votes = self._engine.ahead
        self._stall_s = time.monotonic() - began

    def _settle(self) -> None:
        """Take the writer's next step once no rank is writing. Log the checkpoint once it is whole."""
        assert self._writer is not None
        waited, current = time.monotonic(), self._writer
        self._writer = None  # after a failure there is none
        whole = current.settle()
        now = time.monotonic()
        self._stall_s += now - waited
        if not whole:
            self._writer = current
            return
        place = self._events.place(current.progress)
        self._events.log(Checkpoint(**place, path=current.name, seconds=now - current.began, stall_s=self._stall_s))

    def first(self) -> Progress:
        """Return the progress of a run without a checkpoint, charged with tests of its rate and with what was lost."""
        events = self._world.on_rank0(lambda: list(read_events(self._folder.metrics)))
        choice, self._charged = chosen_rate(events), last_total(events)
        tested, seconds = (0, 0.0) if choice is None else (choice.evaluations, choice.seconds)
        self._events.began -= seconds
        progress = replace(Progress().probed(tested), probe_samples=-1)  # no exact probe
        return progress.replaying(self._charged - tested)

    def load(self) -> Loaded | None:
        """Load the newest intact checkpoint. Return None if no checkpoint was ever written."""
        loaded = self._world.on_rank0(self._look)
        if loaded is None:
            return None
        path = self._world.on_all_ranks(lambda: self._fetched(loaded.name))
        self._engine.load(path)
        if self._data is not None:
            self._data.restore(path)
        self._world.on_all_ranks(lambda: self._beside.load(path))
        kept = self._kept = writer.kept(path)
        self._world.on_rank0(lambda: writer.clean(self._store, keep=self._spec.keep, current=loaded.name, kept=kept))
        self._charged = loaded.progress.ledger.total
        self._step, self._samples = loaded.progress.step, loaded.progress.samples
        self._newest = None if loaded.lost else (loaded.progress, self._beside.version)
        return loaded

    def _fetched(self, name: str) -> Path:
        """Return the checkpoint's folder on this rank's host, where it must be intact too."""
        path = self._store.fetch(name)
        if self._world.rank > 0 and (damage := writer.check(path)):
            raise RunError(f"{path}, as rank {self._world.rank} sees it: {damage}; look at that host's disk or network")
        return path

    def _look(self) -> Loaded | None:
        events = list(read_events(self._folder.metrics))
        if not self._store.names() and not any(isinstance(event, Checkpoint) for event in events):
            return None
        name, progress, damaged = writer.newest(self._store)
        writer.compare(Path(self._store.fetch(name)), self._facts)
        if any(isinstance(event, Rebudget) and event.voids(progress) for event in events):
            progress = replace(progress, ended=None)
        lost = max(0, last_total(events) - progress.ledger.total)
        return Loaded(
            name=name,
            progress=progress.replaying(lost),
            lost=lost,
            damaged=damaged,
            seconds=max((event.time_s for event in events), default=0.0),
            evaluated=evaluated(events, progress.samples),
        )


def evaluated(events: Iterable[Event], samples: int) -> tuple[int, int]:
    """Return (step, samples) of the newest evaluation of the test set up to `samples`, or (0, 0) without one."""
    places = [(event.step, event.samples) for event in history(events) if isinstance(event, Evaluation)]
    return max((place for place in places if place[1] <= samples), default=(0, 0))
