"""Locks of builds: what a killed process left goes, what a living one holds stays."""

import os
import time
from pathlib import Path

import pytest

from distgrow.distributed.world import World

pytest.importorskip("deepspeed")

from distgrow.engine.deepspeed.build_locks import let_builds_begin, stale_locks


def lock_in(folder: Path, *, age_s: float) -> Path:
    """Return a lock of that age."""
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    then = time.time() - age_s
    os.utime(folder / "lock", (then, then))
    return folder / "lock"


def test_only_old_locks_that_nobody_holds_are_stale(tmp_path: Path) -> None:
    old = {lock_in(tmp_path / "py311_cpu" / "left", age_s=3600), lock_in(tmp_path / "left", age_s=3600)}
    lock_in(tmp_path / "py311_cpu" / "young", age_s=5)
    held = lock_in(tmp_path / "py311_cpu" / "held", age_s=3600)
    with held.open():
        assert set(stale_locks(tmp_path)) == old
    assert set(stale_locks(tmp_path)) == old | {held}
    assert stale_locks(tmp_path / "nowhere") == []


def test_an_engine_that_begins_removes_them_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old, young = lock_in(tmp_path / "left", age_s=3600), lock_in(tmp_path / "young", age_s=5)
    with pytest.warns(UserWarning, match=f"removed {old}"):
        let_builds_begin(World())
    assert not old.exists()
    assert young.exists()
