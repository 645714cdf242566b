"""Checkpoints that are killed, damaged or full."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from distgrow import checkpoint
from distgrow.progress import Ledger, Progress
from distgrow.run import RunError
from distgrow.world import World


class Files:
    """An engine whose state is one file; `at_save` happens while it is being written."""

    evaluations = 0

    def __init__(self, content: bytes, at_save: Any = None) -> None:
        self.content, self.at_save = content, at_save

    def update(self, plan: Any, micro_batches: Any, votes: Any = ()) -> Any:
        raise AssertionError("not used")

    def evaluate(self, batches: Any) -> dict[str, float]:
        raise AssertionError("not used")

    def save(self, folder: Path) -> None:
        (folder / "engine.pt").write_bytes(self.content[: len(self.content) // 2])
        if self.at_save is not None:
            self.at_save()
        (folder / "engine.pt").write_bytes(self.content)

    def load(self, folder: Path) -> None:
        self.content = (folder / "engine.pt").read_bytes()


def at(step: int) -> Progress:
    """Progress at a step."""
    return Progress(step=step, samples=16 * step, ledger=Ledger(applied=16 * step, skipped=3))


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Files(b"state"), at(7), keep=3, world=World())
    assert path.name == "step-00000007"
    found, progress, damaged = checkpoint.newest(tmp_path)
    assert (found, progress, damaged) == (path, at(7), [])
    assert {file.name for file in path.iterdir()} == {"engine.pt", "progress.json", "facts.json", "manifest.json"}


def test_a_write_that_is_killed_leaves_nothing_that_loads(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Files(b"old"), at(1), keep=3, world=World())
    child = os.fork()
    if child == 0:
        checkpoint.save(
            tmp_path, Files(b"new", lambda: os.kill(os.getpid(), signal.SIGKILL)), at(2), keep=3, world=World()
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the good one, and the rest of the killed one
    path, progress, damaged = checkpoint.newest(tmp_path)
    assert (progress, damaged) == (at(1), [])
    assert (path / "engine.pt").read_bytes() == b"old"
    checkpoint.clean(tmp_path, keep=3, current=path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    checkpoint.save(tmp_path, Files(b"old"), at(1), keep=3, world=World())
    with pytest.raises(RunError, match=r"No space left on device; free some space"):
        checkpoint.save(tmp_path, Files(b"new", fail), at(2), keep=3, world=World())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["engine.pt", "progress.json", "facts.json", "manifest.json"])
@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_any_flipped_bit_is_noticed(tmp_path: Path, name: str, bit: int) -> None:
    good = checkpoint.save(tmp_path, Files(b"old state"), at(1), keep=3, world=World())
    bad = checkpoint.save(tmp_path, Files(b"new state"), at(2), keep=3, world=World())
    content = (bad / name).read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (bad / name).write_bytes(flipped)
        if name == "manifest.json" and flipped.split() == content.split():
            continue  # only the white space between the words has changed
        path, _, damaged = checkpoint.newest(tmp_path)
        assert path == good, place
        assert damaged[0].startswith("step-00000002")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100, 1000000000):
        checkpoint.save(tmp_path, Files(b"state"), at(step), keep=2, world=World())
    assert [path.name for path in checkpoint.stored(tmp_path)] == ["step-00000100", "step-1000000000"]


def test_the_same_step_with_more_skipped_updates_replaces_itself(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Files(b"state"), at(5), keep=2, world=World())
    later = Progress(step=5, samples=96, ledger=Ledger(applied=80, skipped=16))
    checkpoint.save(tmp_path, Files(b"state"), later, keep=2, world=World())
    assert checkpoint.newest(tmp_path)[1] == later
    assert len(list(tmp_path.iterdir())) == 1


def test_all_damaged_is_said_with_every_name(tmp_path: Path) -> None:
    for step in (1, 2):
        (checkpoint.save(tmp_path, Files(b"state"), at(step), keep=2, world=World()) / "engine.pt").unlink()
    with pytest.raises(RunError, match=r"step-00000002: engine.pt is missing; step-00000001: engine.pt is missing"):
        checkpoint.newest(tmp_path)


def test_a_write_killed_between_two_renames_leaves_the_replaced_checkpoint(tmp_path: Path) -> None:
    old = checkpoint.save(tmp_path, Files(b"old"), at(5), keep=1, world=World())
    old.rename(old.with_name(old.name + ".replaced"))
    path, progress, _ = checkpoint.newest(tmp_path)
    assert (progress, (path / "engine.pt").read_bytes()) == (at(5), b"old")
    checkpoint.clean(tmp_path, keep=1, current=path)
    assert checkpoint.stored(tmp_path) == [path]
    new = checkpoint.save(tmp_path, Files(b"new"), at(5), keep=1, world=World())
    assert checkpoint.stored(tmp_path) == [new]


def test_a_checkpoint_of_other_data_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Files(b"state"), at(1), keep=1, world=World(), facts={"training samples": 1437})
    checkpoint.compare(path, {"training samples": 1437})
    with pytest.raises(RunError, match="1,437 training samples then, 1,500 now"):
        checkpoint.compare(path, {"training samples": 1500})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_a_resume_goes_on_from_is_never_deleted(tmp_path: Path, keep: int) -> None:
    saved = [checkpoint.save(tmp_path, Files(b"state"), at(step), keep=9, world=World()) for step in (3, 4, 5)]
    (saved[2] / "engine.pt").write_bytes(b"damaged")
    path, _, damaged = checkpoint.newest(tmp_path)
    assert (path, len(damaged)) == (saved[1], 1)
    checkpoint.clean(tmp_path, keep=keep, current=path)
    assert checkpoint.stored(tmp_path) == [*saved[:1] * (keep > 1), path, saved[2]]
    saved[2].rename(tmp_path / "step-00000005.replaced")
    again = checkpoint.save(tmp_path, Files(b"new"), at(5), keep=keep, world=World())
    assert checkpoint.stored(tmp_path) == [*[*saved[:1], path][max(0, 3 - keep) :][: keep - 1], again]
