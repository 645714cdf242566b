"""Launchers: how this process was started and how others are; the only reader of the environment; loads no torch."""

import atexit
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn


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


def run_groups(groups: Iterable[tuple[int, Sequence[str]]], *, restarts: int = 0) -> int:
    """Run `python -m distgrow arguments` for each (ranks, arguments), one group after the other: the exit code.

    They run on this host by torchrun's own launcher. Where a rank fails, its group is started again, `restarts` times
    at most. A signal is passed on to the ranks, which checkpoint and end on SIGTERM; the code is then 128 + its number,
    also when it comes between two groups.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        for workers, arguments in groups:
            _run_group(workers, arguments, restarts)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return 2 if first.exitcode == 2 else 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _run_group(workers: int, arguments: Sequence[str], restarts: int) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id="distgrow",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
    )
    with _defaults(
        OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // workers)),
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="110",  # a checkpoint may take longer than torch's 30 s
        # a store that outlives a group would give the next one the addresses of ranks that have died
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    ):
        elastic_launch(config, sys.executable)("-m", "distgrow", *arguments)


def leave() -> NoReturn:
    """End this process with exit code 0 after its threads and exit handlers, without the interpreter's finalisation.

    A thread in C++ aborts a process that is finalised under it: gloo's outlive their process group, and drop tensors.
    """
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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
