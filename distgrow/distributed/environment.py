"""What the launcher has set for this process; the only reader of the environment; loads no torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def launched() -> bool:
    """Whether a launcher (torchrun, Ray Train) has put this process into a group."""
    return "WORLD_SIZE" in os.environ


_NAMES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def place() -> tuple[int, int, int]:
    """(rank, world size, rank on this host) as the launcher has set them; (0, 1, 0) without one."""
    rank, size, local = (os.environ.get(name, default) for name, default in _NAMES)
    return int(rank), int(size), int(local)


@contextmanager
def local_rank_named() -> Iterator[None]:
    """LOCAL_RANK is set meanwhile: DeepSpeed insists on it, in one process too."""
    with _defaults(LOCAL_RANK="0"):
        yield


def named_ray_cluster() -> str | None:
    """The Ray cluster that the environment names, as `ray job submit` does for its drivers."""
    return os.environ.get("RAY_ADDRESS")


def name_ray_cluster(address: str) -> None:
    """Say which Ray cluster this process belongs to: Ray's own helpers would guess, wrongly where a host has two."""
    os.environ["RAY_ADDRESS"] = address


def ray_train_settings() -> dict[str, str]:
    """This process' settings of Ray Train, for the process that keeps its trainer."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}


def head_patience_s() -> float:
    """Seconds that Ray's processes go on without the cluster's head before they end, by Ray's own setting."""
    setting = "RAY_gcs_rpc_server_reconnect_timeout_s"
    return float(os.environ.get(setting, "60"))


def name_interface(address: str) -> None:
    """Bind gloo and NCCL to the network interface that owns this host's `address`, unless the user has named one.

    Left alone, gloo binds to what the host's name resolves to, which is the loopback on many hosts.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


@contextmanager
def _defaults(**values: str) -> Iterator[None]:
    """Variables of the environment that are set meanwhile, unless the user has set them."""
    missing = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
