"""Which group of ranks follows which, whatever has become of the request and of the checkpoints."""

import time
from pathlib import Path
from typing import Any

import pytest

from distgrow.checkpoint import writer
from distgrow.checkpoint.manager import back_off
from distgrow.checkpoint.storage import Folder
from distgrow.config.load import load
from distgrow.config.run import Run
from distgrow.core.errors import RunError, TrainingFailed
from distgrow.core.progress import Ledger, Progress
from distgrow.distributed.world import World
from distgrow.launch.elastic import groups, launching
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder
from distgrow.run.resize_request import ResizeRequest

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"
BY_STAGE = "launch.workers={0: 1, 1: 4, 2: 2}"


class NoState:
    """An engine with nothing to save."""

    evaluations = 0
    groups: list[str] = []

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
        return {"engine.pt": b"state"}

    def load(self, folder: Path) -> None:
        raise AssertionError("not used")

    def close(self) -> None:
        raise AssertionError("not used")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def run_in(folder: RunFolder, workers: str = BY_STAGE) -> Run:
    return load(DIGITS, [f"run.dir={folder.path}", workers, "stages={every: {samples: 320}}"])


def save(folder: RunFolder, samples: int, stage: int) -> Path:
    progress = Progress(step=samples, samples=samples, stage=stage, ledger=Ledger(applied=samples))
    store = Folder(folder.checkpoints)
    return folder.checkpoints / writer.save(store, NoState(), progress, keep=9, world=World())


def ask(folder: RunFolder) -> None:
    resize_request.ask(folder, ResizeRequest(old=1, asked_at=time.time() - 5, time_s=60.0))


def test_a_run_that_nobody_has_begun_starts_with_what_its_first_stage_wants(folder: RunFolder) -> None:
    assert list(groups(run_in(folder), folder)) == [1]
    assert list(groups(run_in(folder, "launch.workers=3"), folder)) == [3]


@pytest.mark.parametrize(("samples", "stage", "size"), [(0, 0, 1), (304, 0, 1), (320, 0, 4), (320, 1, 4), (640, 1, 2)])
def test_a_run_goes_on_with_what_the_next_update_after_its_checkpoint_wants(
    folder: RunFolder, samples: int, stage: int, size: int
) -> None:
    save(folder, samples, stage)
    assert next(groups(run_in(folder), folder)) == size


def test_a_group_follows_where_one_was_asked_for_and_only_then(folder: RunFolder) -> None:
    following = groups(run_in(folder), folder)
    assert next(following) == 1
    save(folder, 320, 1)
    ask(folder)
    assert next(following) == 4
    assert resize_request.pending(folder)
    request = resize_request.answered(folder)
    assert request is not None
    assert (request.old, request.time_s) == (1, 60.0)
    assert 5 <= request.seconds < 10
    assert not resize_request.pending(folder)
    assert list(following) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", "7", '{"old": 1}', '{"old": "one", "asked_at": 1, "time_s": 1}'])
def test_a_damaged_request_is_a_request_all_the_same(folder: RunFolder, damage: str) -> None:
    following = groups(run_in(folder), folder)
    next(following)
    save(folder, 320, 1)
    ask(folder)
    (folder.path / ".resize-asked").write_text(damage)
    assert next(following) == 4
    assert resize_request.answered(folder) is None
    assert not resize_request.pending(folder)


def test_a_request_that_was_never_answered_is_forgotten_by_the_next_command(folder: RunFolder) -> None:
    ask(folder)
    with launching(folder):
        assert not resize_request.pending(folder)
        assert list(groups(run_in(folder), folder)) == [1]


def test_a_fixed_number_of_workers_heeds_no_request(folder: RunFolder) -> None:
    ask(folder)
    assert list(groups(run_in(folder, "launch.workers=3"), folder)) == [3]


def test_a_hand_over_is_no_failure_to_back_off_from(folder: RunFolder) -> None:
    folder.metrics.write_text('{"event": "checkpoint"}\n')
    ask(folder)
    began = time.monotonic()
    back_off(folder, 60.0)
    assert time.monotonic() - began < 30


def test_who_is_asked_to_stop_between_two_groups_starts_no_other(folder: RunFolder) -> None:
    following = groups(run_in(folder), folder)
    next(following)
    save(folder, 320, 1)
    ask(folder)
    folder.request_stop()
    assert list(following) == []
    assert resize_request.pending(folder)


def test_a_boundary_whose_checkpoint_cannot_be_read_ends_the_run_instead_of_repeating_its_stage_for_ever(
    folder: RunFolder,
) -> None:
    save(folder, 0, 0)
    following = groups(run_in(folder), folder)
    assert next(following) == 1
    (save(folder, 320, 1) / "engine.pt").write_text("damaged")
    ask(folder)
    with pytest.raises(TrainingFailed, match="wants 1 again; look at the disk, then go on with --resume"):
        next(following)


def test_only_one_command_at_a_time_starts_groups_of_a_run(folder: RunFolder) -> None:
    with launching(folder), pytest.raises(RunError, match="being trained by another command"), launching(folder):
        pass
    with launching(folder):
        pass
