"""Runs to read from: a folder or a place in object storage, and the checkpoint in it that is asked for."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distgrow.checkpoint import writer
from distgrow.checkpoint.remote import Remote, below
from distgrow.checkpoint.storage import Folder, Store, at
from distgrow.core.errors import ConfigError, RunError
from distgrow.core.yaml_text import plain, read_file
from distgrow.run.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Source:
    """Hold where a run's files are."""

    name: str  #: as the user has given it
    folder: RunFolder  #: has config.yaml, and what `pretrained` has kept
    store: Store


@contextmanager
def opened(run: str | Path) -> Iterator[Source]:
    """Yield where a run's files are. Copies of those in object storage last as long as the context.

    Args:
        run: The run's folder, or its URI in object storage: launch.storage_path and the name of run.dir.

    Raises:
        ConfigError: There is no run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "fetched"
        if "://" in str(run):
            folder, store = RunFolder(Path(scratch) / "run"), Remote(str(run), cache, key="RUN")
            store.pull_settings(folder)
        else:
            folder = RunFolder(run)
            store = Folder(folder.checkpoints)
        if not folder.config.is_file():
            raise ConfigError(
                f"{run} is not a run's folder; give run.dir of a run that has begun, or its URI in object storage"
            )
        if isinstance(store, Folder) and not store.names() and (uri := _storage_path(folder)):
            store = Remote(below(uri, folder.path.resolve().name), cache)
        yield Source(str(run), folder, store)


def checkpoint(source: Source, *, best: bool, step: int | None) -> tuple[str, Sequence[str]]:
    """Return the name of the checkpoint that is asked for, and the damage of newer ones.

    Args:
        source: The run.
        best: Take the one that the run kept as its best.
        step: Take that of this step. None: the newest intact one.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    if best and step is not None:
        raise ConfigError(f"best and step={step} were both given; each names a checkpoint: leave one out")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ConfigError(f"step={step!r} must be a whole number of updates of at least 0")
    store, names = source.store, source.store.names()
    if not names:
        raise ConfigError(
            f"{source.name} holds no checkpoint; train until there is one. Under the Transformers Trainer, Lightning "
            "or your own loop, the weights are where that saves them"
        )
    intact, _, damaged = writer.newest(store)
    if best:
        step = writer.kept(store.fetch(intact)).get("best")
        if step is None:
            raise ConfigError(
                f"{source.name} has kept no best checkpoint; leave out --best (in Python best=True), or train with "
                "run.keep (in Python hooks=[KeepBest(…)])"
            )
    if step is None:
        return intact, damaged
    name = writer.of_step(names, step)
    if name is None:
        there = ", ".join(dict.fromkeys(str(at(name)[0]) for name in names))
        raise ConfigError(f"step={step}: {source.name} has no checkpoint of that step; there are those of {there}")
    if damage := writer.check(store.fetch(name)):
        raise RunError(f"{store.where}/{name} is damaged: {damage}; the newest intact one is step={at(intact)[0]}")
    return name, ()


def _storage_path(folder: RunFolder) -> str | None:
    """Return launch.storage_path of a run that a config has started."""
    settings = plain(read_file(folder.config))
    launch = settings.get("launch") if isinstance(settings, dict) else None
    return launch.get("storage_path") if isinstance(launch, dict) else None
