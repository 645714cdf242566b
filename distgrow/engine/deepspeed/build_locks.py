"""Remove locks of torch's C++ builds that a killed process left; DeepSpeed would wait for them without end."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from distgrow.distributed.environment import place
from distgrow.distributed.world import World

OLD_S = 600.0  #: a build of one of DeepSpeed's operators takes about a minute


def let_builds_begin(world: World) -> None:
    """Remove stale locks, by one rank of each host, before any rank may build.

    torch builds an operator at its first use, under a lock that is a file. A process that is killed meanwhile leaves
    it, and every later run waits for it.
    """
    if place()[2] == 0:
        for lock in stale_locks(builds()):
            warnings.warn(f"removed {lock}, which a process that was killed while it compiled had left", stacklevel=2)
            lock.unlink(missing_ok=True)
    world.sum([0.0])  # no rank builds until all hosts have looked


def builds() -> Path:
    """Return the folder that torch builds extensions in."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def stale_locks(root: Path, *, old_s: float = OLD_S) -> list[Path]:
    """Return the locks under `root` that are older than `old_s` seconds and that no process of this host has open."""
    locks = [lock for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)]
    old = [lock for lock in locks if time.time() - lock.stat().st_mtime > old_s]
    held = set(_open_files()) if old else set[Path]()
    return [lock for lock in old if lock.resolve() not in held]


def _open_files() -> Iterator[Path]:
    """Yield the files that processes have open, as far as /proc tells this user."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to someone else
            for file in (process / "fd").iterdir():
                with suppress(OSError):
                    yield file.readlink()
