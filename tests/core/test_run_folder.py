"""A run's folder is never overwritten, belongs to one writer, and goes on only with the settings it began with."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distgrow.core.errors import RunError
from distgrow.run.folder import RunFolder, storing
from distgrow.run.resume_check import differences
from distgrow.run.stop import StopRequests

SETTINGS: dict[str, Any] = {
    "growth": {"kind": "exponential", "start": 16, "cap": None},
    "stages": {"every": {"epochs": [1.0, 2.5]}},
    "lr": {"base": 1e-05, "decay": {"kind": "none"}},
    "engine": {"kind": "torch", "max_micro": 64, "device": "auto", "compile": False, "precision": "float32"},
    "launch": {"kind": "local", "workers": 1},
    "run": {"dir": "runs/a", "seed": 0, "log_every": 1},
}
REFUSALS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "choose a run.dir that can be written",
    errno.EACCES: "choose a run.dir that can be written",
}
words = st.sampled_from(["alpha", "beta", "gamma", "delta"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = scalars | st.lists(scalars, max_size=3)
trees = st.dictionaries(words, values | st.dictionaries(words, values, max_size=3), max_size=3)


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """SETTINGS with one key set to another value."""

    def place(values: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
        head, *rest = path
        return {**values, head: place(values[head], rest) if rest else value}

    return place(SETTINGS, dotted.split("."))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A folder with a run in it."""
    folder = RunFolder(tmp_path / "run")
    folder.create(SETTINGS)
    return folder


# ── creating and reopening ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("file", ["config.yaml", "notes.txt", "checkpoints/step-00000001/engine.pt"])
def test_a_folder_that_holds_anything_is_refused_and_left_as_it_was(file: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(RunError, match="exists already and is never overwritten") as refused:
        RunFolder(tmp_path / "run").create(SETTINGS)
    assert contents(tmp_path) == before
    for way in (str(tmp_path / "run"), "--resume", "another run.dir"):
        assert way in str(refused.value)


def test_a_run_that_was_created_is_not_created_again(folder: RunFolder) -> None:
    before = contents(folder.path)
    with pytest.raises(RunError, match="never overwritten"):
        folder.create(changed("lr.base", 0.5))
    assert contents(folder.path) == before
    folder.reopen(SETTINGS)


def test_an_empty_folder_and_one_with_only_its_lock_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").create(SETTINGS)
    locked = RunFolder(tmp_path / "locked")
    locked.lock()
    locked.create(SETTINGS)
    locked.unlock()
    locked.reopen(SETTINGS)


def test_creating_leaves_no_partial_file(folder: RunFolder) -> None:
    assert set(contents(folder.path)) == {"config.yaml"}


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume; start it without --resume"):
        RunFolder(tmp_path / "none").reopen(SETTINGS)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("growth.start", 8),
        ("growth.cap", 512),
        ("stages.every.epochs", [1.0, 2.0]),
        ("lr.base", 2e-05),
        ("lr.decay", {"kind": "none", "extra": 1}),
        ("engine.precision", "float64"),
        ("run.seed", 1),
    ],
)
def test_a_key_that_decides_what_is_computed_may_not_change(folder: RunFolder, key: str, value: Any) -> None:
    before = contents(folder.path)
    with pytest.raises(RunError, match="was started with another config") as refused:
        folder.reopen(changed(key, value))
    assert [line.strip().partition(":")[0].startswith(key) for line in str(refused.value).splitlines()[1:]] == [True]
    assert contents(folder.path) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("launch.kind", "ray"),
        ("launch.workers", 8),
        ("launch", {"kind": "ray", "address": "auto"}),
        ("engine.max_micro", 8),
        ("engine.device", "cpu"),
        ("engine.compile", True),
        ("run.dir", "elsewhere"),
        ("run.log_every", 10),
    ],
)
def test_a_key_that_decides_only_where_and_how_fast_may_change(folder: RunFolder, key: str, value: Any) -> None:
    folder.reopen(changed(key, value))


def test_every_difference_is_listed_with_both_values(folder: RunFolder) -> None:
    now = {**changed("lr.base", 0.5), "growth": {"kind": "constant", "start": 16}, "run": {"dir": "b", "seed": 3}}
    with pytest.raises(RunError) as refused:
        folder.reopen(now)
    assert sorted(line.strip() for line in str(refused.value).splitlines()[1:]) == [
        "growth.kind: 'exponential' in the folder, 'constant' now",
        "lr.base: 1e-05 in the folder, 0.5 now",
        "run.seed: 0 in the folder, 3 now",
    ]


def test_how_noise_is_measured_belongs_to_what_is_computed() -> None:
    before = {"run": {"dir": "a", "noise": {"every": None, "window": 100}, "log_every": 1}}
    after = {"run": {"dir": "b", "noise": {"every": 4, "window": 50}, "log_every": 9}}
    assert [key for key, *_ in differences(before, after)] == ["run.noise.every", "run.noise.window"]


@given(trees)
def test_settings_do_not_differ_from_themselves(tree: dict[str, Any]) -> None:
    assert differences(tree, tree) == []


@settings(max_examples=60, deadline=None)
@given(tree=trees)
@example(tree={"next line": "\x85", "path": "/daten/größe 训练", "lines": "a\n\u2028 b"})
def test_settings_are_found_again_as_they_were_written(
    tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.create(tree)
    folder.reopen(tree)


@given(st.dictionaries(words, st.integers()), st.dictionaries(words, st.integers()))
def test_exactly_the_keys_with_other_values_differ(before: dict[str, int], after: dict[str, int]) -> None:
    wanted = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    found = differences({"lr": before}, {"lr": after})
    assert {key for key, _, _ in found} == {f"lr.{key}" for key in wanted}
    assert len(found) == len(wanted)


# ── one writer ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    for writer, other in [(first, second), (second, first)] * 2:
        writer.lock()
        with pytest.raises(RunError, match="is being written by another process") as refused:
            other.lock()
        assert str(tmp_path / "run") in str(refused.value)
        writer.unlock()


def test_writers_of_other_folders_are_not_kept_waiting(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name) for name in "abc"]
    for folder in folders:
        folder.lock()
    for folder in folders:
        folder.unlock()


def test_a_request_to_stop_is_used_up_once(folder: RunFolder) -> None:
    assert not folder.stop_requested()
    for _ in range(2):
        folder.request_stop()
        folder.request_stop()
        assert [RunFolder(folder.path).stop_requested() for _ in range(3)] == [True, False, False]


# ── what the file system refuses ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("number", "remedy"), REFUSALS.items(), ids=str)
def test_a_refusal_of_the_file_system_names_the_path_and_the_remedy(number: int, remedy: str) -> None:
    with pytest.raises(RunError) as refused, storing(Path("runs/here")):
        raise OSError(number, os.strerror(number))
    for word in ("runs/here", os.strerror(number), remedy, "--resume"):
        assert word in str(refused.value)
    assert isinstance(refused.value.__cause__, OSError)


@pytest.mark.parametrize("error", [OSError(errno.ENXIO, "broken disk"), OSError("without a number"), KeyError("x")])
def test_an_error_that_the_user_cannot_put_right_is_passed_on(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, storing(Path("runs/here")):
        raise error
    assert passed.value is error


@pytest.mark.parametrize("inside", ["file", "file/run", "file/deep/run"])
@pytest.mark.parametrize("verb", ["create", "lock"])
def test_a_path_below_a_file_is_refused(inside: str, verb: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    folder = RunFolder(tmp_path / inside)
    with pytest.raises(RunError, match="choose") as refused:
        folder.lock() if verb == "lock" else folder.create(SETTINGS)
    assert str(tmp_path / inside) in str(refused.value)
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("verb", ["mkdir", "write_text", "replace"])
def test_a_run_that_found_the_disk_full_can_be_started_once_there_is_space(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, verb, refuse)
        with pytest.raises(RunError, match="free some space"):
            RunFolder(tmp_path / "run").create(SETTINGS)
    assert not (tmp_path / "run/config.yaml").exists()
    RunFolder(tmp_path / "run").create(SETTINGS)
    RunFolder(tmp_path / "run").reopen(SETTINGS)


def test_a_request_for_a_checkpoint_is_told_once_and_stops_nothing(folder: RunFolder) -> None:
    requests = StopRequests(folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.checkpoint.touch()
    assert [requests.poll() for _ in range(3)] == [(False, True), (False, False), (False, False)]
    assert not folder.checkpoint.exists()
