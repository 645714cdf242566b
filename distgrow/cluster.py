"""Ray Train adapter: the same run as a TorchTrainer's worker group; the only file that imports ray."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from distgrow.config import Run, parse
from distgrow.launcher import name_interface, named_ray_cluster
from distgrow.run import RunFolder, TrainingFailed
from distgrow.spec import ConfigError


def train(run: Run, *, resume: bool | None) -> None:
    """Train on `launch.workers` Ray workers: on the cluster of launch.address or RAY_ADDRESS, else on a local one.

    Raises what the first worker to fail raised where that is for users; a RuntimeError with its traceback otherwise.
    """
    folder = RunFolder(Path(run.run.dir).absolute())
    resume = folder.begun() if resume is None else resume
    folder.check(resume=resume)
    placed = run.model_copy(update={"run": run.run.model_copy(update={"dir": str(folder.path)})})
    with _session(run) as gpus:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"run": placed.model_dump(mode="json"), "path": sys.path},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=run.launch.workers,
                use_gpu=gpus,
                resources_per_worker=run.launch.resources_per_worker or None,
                placement_strategy=run.launch.placement,
            ),
            run_config=RunConfig(
                name=f"{time.time_ns()}",
                storage_path=str(folder.ray),
                failure_config=FailureConfig(max_failures=run.launch.max_failures),
            ),
        )
        try:
            with _passing_on_sigterm(folder):
                trainer.fit()
        except TrainingFailedError as error:
            raise _first_failure(error) from None


def _worker(job: dict[str, Any]) -> None:
    """One rank, in a process of Ray's, in the process group that Ray Train made.

    The driver has looked at the folder; after a failure Ray calls this again, and the run there goes on.
    """
    sys.path.extend(entry for entry in job["path"] if entry not in sys.path)
    parse(job["run"]).fit(resume=None)


def _knock(address: str) -> None:
    """OSError where nothing listens at host:port; Ray itself would try again for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _prepare() -> None:
    """Run by Ray in each of its processes, before Ray Train makes the process group there."""
    name_interface(ray.util.get_node_ip_address())


@contextmanager
def _session(run: Run) -> Iterator[bool]:
    """A connection to a Ray cluster, for as long as the context lasts; whether workers get GPUs."""
    address = run.launch.address or named_ray_cluster()
    everywhere = {"worker_process_setup_hook": _prepare}
    if address is None:
        cpus = max(os.cpu_count() or 1, run.launch.workers)
        ray.init(address="local", num_cpus=cpus, runtime_env=everywhere)
    else:
        try:
            _knock(address)
            ray.init(address=address, runtime_env=everywhere)
        except OSError as error:  # ConnectionError among them
            raise ConfigError(
                f"launch.address={address}: no Ray cluster answers there; start one (ray start --head), "
                f"correct the address, or leave it out for a local one ({error})"
            ) from None
    try:
        there = ray.cluster_resources().get("GPU", 0) >= run.launch.workers
        yield run.engine.device == "cuda" or (run.engine.device == "auto" and there)
    finally:
        ray.shutdown()


@contextmanager
def _passing_on_sigterm(folder: RunFolder) -> Iterator[None]:
    """SIGTERM to the driver asks the workers to checkpoint and end."""
    before = signal.signal(signal.SIGTERM, lambda *_: folder.request_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        folder.stop_requested()


def _first_failure(error: TrainingFailedError) -> Exception:
    """What the worker that failed first raised; peers that only lost it come after it."""
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return error
    failures = error.worker_failures
    rank, first = min(failures.items(), key=lambda item: (_lost_a_peer(item[1]), item[0]))
    cause = getattr(first, "cause", None) or first.__cause__ or first
    if isinstance(cause, ConfigError | TrainingFailed):
        return cause
    return RuntimeError(f"worker {rank} failed first:\n{''.join(traceback.format_exception(cause))}")


def _lost_a_peer(error: BaseException) -> bool:
    return "Connection closed by peer" in str(error) or "connectFullMesh" in str(error)
