"""The environment that a launcher has set for this process. Nothing else reads it. Loads no torch."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distgrow.core.errors import ConfigError

#: A variable of the environment in a path.
_VARIABLE = re.compile(r"\$(\w+|\{\w*\})")


def launched() -> bool:
    """Return whether a launcher (torchrun, Ray Train) has put this process into a process group."""
    return "WORLD_SIZE" in os.environ


_NAMES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def place() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as the launcher set them, or (0, 1, 0) without a launcher."""
    rank, size, local = (os.environ.get(name, default) for name, default in _NAMES)
    return int(rank), int(size), int(local)


@contextmanager
def local_rank_named() -> Iterator[None]:
    """Set LOCAL_RANK inside the context. DeepSpeed needs it even in a single process."""
    with defaults(LOCAL_RANK="0"):
        yield


def expanded(path: str) -> str:
    """Return a path whose ~ and $NAMES are replaced. Raise ConfigError if one of them has no value."""
    full = os.path.expandvars(str(Path(path).expanduser()) if path.startswith("~/") else path)
    if full.startswith("~") or _VARIABLE.search(full):
        raise ConfigError(f"{path!r} names a home or a variable that is not set here; write the path out")
    return full


def in_ray_package() -> bool:
    """Return whether this process works in Ray's copy of a submitted folder, which Ray deletes when it likes."""
    here = Path.cwd().parts
    return "working_dir_files" in here and any(part.startswith("_ray_pkg_") for part in here)


def named_ray_cluster() -> str | None:
    """Return the address in RAY_ADDRESS, which `ray job submit` sets for its drivers, or None."""
    return os.environ.get("RAY_ADDRESS")


def name_ray_cluster(address: str) -> None:
    """Set the address of the Ray cluster that this process belongs to.

    Ray's own helpers would guess it, and guess wrong if a host runs two clusters.
    """
    os.environ["RAY_ADDRESS"] = address


def ray_train_settings() -> dict[str, str]:
    """Return this process' environment variables of Ray Train, for the process that runs its controller."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}


def head_patience_s() -> float:
    """Return the seconds that Ray's processes survive without the cluster's head, as Ray is configured."""
    setting = "RAY_gcs_rpc_server_reconnect_timeout_s"
    return float(os.environ.get(setting, "60"))


def name_interface(address: str) -> None:
    """Bind gloo and NCCL to the network interface that owns `address`, unless the user has named an interface.

    Without this, gloo binds to the address of the host's name, which is the loopback address on many hosts.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


@contextmanager
def defaults(**values: str) -> Iterator[None]:
    """Set environment variables inside the context, except those that the user has set."""
    missing = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
