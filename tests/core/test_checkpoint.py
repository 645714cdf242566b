"""Checkpoints that are killed, damaged or full."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distgrow.checkpoint import writer
from distgrow.checkpoint.storage import Folder
from distgrow.core.errors import RunError
from distgrow.core.progress import Ledger, Progress
from distgrow.distributed.world import World
from distgrow.run.folder import storing


class Files:
    """An engine whose state is one file."""

    evaluations = 0
    groups: list[str] = []

    def __init__(self, content: bytes) -> None:
        self.content = content

    def update(self, plan: Any, micro_batches: Any, votes: Any = ()) -> Any:
        raise AssertionError("not used")

    def drain(self) -> bool:
        raise AssertionError("not used")

    ahead = 0

    def last(self) -> Any:
        return None

    def withdrawn(self) -> Any:
        raise AssertionError("not used")

    def parameter_noise(self) -> dict[str, tuple[float, float]]:
        raise AssertionError("not used")

    def settings(self, plan: Any) -> dict[str, float]:
        raise AssertionError("not used")

    def evaluate(self, batches: Any) -> dict[str, float]:
        raise AssertionError("not used")

    def at_average(self) -> Any:
        raise NotImplementedError

    def functional(self) -> Any:
        raise AssertionError("not used")

    def snapshot(self) -> dict[str, bytes]:
        return {"engine.pt": self.content}

    def load(self, folder: Path) -> None:
        self.content = (folder / "engine.pt").read_bytes()

    def close(self) -> None:
        raise AssertionError("not used")


class Faulty(Folder):
    """A folder in which something happens when engine.pt is half written."""

    def __init__(self, path: Path, happens: Callable[[], None]) -> None:
        super().__init__(path)
        self.happens = happens

    def write(self, place: str, file: str, data: bytes) -> None:
        if file == "engine.pt":
            (self.path / place / file).write_bytes(data[: len(data) // 2])
            with storing(self.path):
                self.happens()
        super().write(place, file, data)


def saved(folder: Path, content: bytes, progress: Progress, *, keep: int = 3, **more: Any) -> Path:
    """A checkpoint's path."""
    return folder / writer.save(Folder(folder), Files(content), progress, keep=keep, world=World(), **more)


def newest(folder: Path) -> tuple[Path, Progress, list[str]]:
    """The newest intact checkpoint of a folder."""
    name, progress, damaged = writer.newest(Folder(folder))
    return folder / name, progress, damaged


def stored(folder: Path) -> list[Path]:
    """All checkpoints, the oldest first."""
    return [folder / name for name in Folder(folder).names()]


def at(step: int) -> Progress:
    """Progress at a step."""
    return Progress(step=step, samples=16 * step, ledger=Ledger(applied=16 * step, skipped=3))


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    path = saved(tmp_path, b"state", at(7), keep=3)
    assert path.name == "step-00000007"
    found, progress, damaged = newest(tmp_path)
    assert (found, progress, damaged) == (path, at(7), [])
    assert {file.name for file in path.iterdir()} == {"engine.pt", "progress.json", "facts.json", "manifest.json"}


def test_a_write_that_is_killed_leaves_nothing_that_loads(tmp_path: Path) -> None:
    saved(tmp_path, b"old", at(1), keep=3)
    child = os.fork()
    if child == 0:
        dying = Faulty(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
        writer.save(dying, Files(b"new"), at(2), keep=3, world=World())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the good one, and the rest of the killed one
    path, progress, damaged = newest(tmp_path)
    assert (progress, damaged) == (at(1), [])
    assert (path / "engine.pt").read_bytes() == b"old"
    writer.clean(Folder(tmp_path), keep=3, current=path.name)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    saved(tmp_path, b"old", at(1), keep=3)
    with pytest.raises(RunError, match=r"No space left on device; free some space"):
        writer.save(Faulty(tmp_path, fail), Files(b"new"), at(2), keep=3, world=World())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["engine.pt", "progress.json", "facts.json", "manifest.json"])
@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_any_flipped_bit_is_noticed(tmp_path: Path, name: str, bit: int) -> None:
    good = saved(tmp_path, b"old state", at(1), keep=3)
    bad = saved(tmp_path, b"new state", at(2), keep=3)
    content = (bad / name).read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (bad / name).write_bytes(flipped)
        if name == "manifest.json" and flipped.split() == content.split():
            continue  # only the white space between the words has changed
        path, _, damaged = newest(tmp_path)
        assert path == good, place
        assert damaged[0].startswith("step-00000002")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100, 1000000000):
        saved(tmp_path, b"state", at(step), keep=2)
    assert [path.name for path in stored(tmp_path)] == ["step-00000100", "step-1000000000"]


def test_the_same_step_with_more_skipped_updates_is_the_newer_one(tmp_path: Path) -> None:
    saved(tmp_path, b"state", at(5), keep=1)
    for skipped in (16, 32, 48):
        later = Progress(step=5, samples=80 + skipped, ledger=Ledger(applied=80, skipped=skipped))
        saved(tmp_path, b"state", later, keep=3)
        assert newest(tmp_path)[1] == later
        assert len(list(tmp_path.iterdir())) == 1
    saved(tmp_path, b"state", at(6), keep=2)
    assert [path.name for path in stored(tmp_path)] == ["step-00000005.3", "step-00000006"]


def test_all_damaged_is_said_with_every_name(tmp_path: Path) -> None:
    for step in (1, 2):
        (saved(tmp_path, b"state", at(step), keep=2) / "engine.pt").unlink()
    with pytest.raises(RunError, match=r"step-00000002: engine.pt is missing; step-00000001: engine.pt is missing"):
        newest(tmp_path)


def test_a_checkpoint_of_other_data_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = saved(tmp_path, b"state", at(1), keep=1, facts={"training samples": 1437})
    writer.compare(path, {"training samples": 1437})
    with pytest.raises(RunError, match="1,437 training samples then, 1,500 now"):
        writer.compare(path, {"training samples": 1500})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_a_resume_goes_on_from_is_never_deleted(tmp_path: Path, keep: int) -> None:
    before = [saved(tmp_path, b"state", at(step), keep=9) for step in (3, 4, 5)]
    (before[2] / "engine.pt").write_bytes(b"damaged")
    path, _, damaged = newest(tmp_path)
    assert (path, len(damaged)) == (before[1], 1)
    writer.clean(Folder(tmp_path), keep=keep, current=path.name)
    assert stored(tmp_path) == [*before[:1] * (keep > 1), path, before[2]]
    again = saved(tmp_path, b"new", at(5), keep=keep)
    assert stored(tmp_path) == [*[*before[:1], path][max(0, 3 - keep) :][: keep - 1], again]
