"""Worker groups of Ray Train: as many workers as the cluster can give, according to Ray's own scheduler."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import placement_group, remove_placement_group

from distgrow.checkpoint.remote import below
from distgrow.core.scaling import least
from distgrow.launch.ray.spec import Ray
from distgrow.run.folder import RunFolder

#: Seconds in which Ray places a group that fits.
PLACEMENT_S = 3.0


def worker_group(
    train_fn: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    launch: Ray,
    folder: RunFolder,
    *,
    num_workers: int,
    gpus: bool,
) -> TorchTrainer:
    """Build a TorchTrainer that runs `train_fn(config)` in `num_workers` workers, or in as many as fit in time."""
    return TorchTrainer(
        train_fn,
        train_loop_config=config,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=round(launch.timeout_s)),
        scaling_config=scaling(launch, num_workers, gpus=gpus, stopping=folder.stop.exists),
        run_config=RunConfig(
            name=f"{folder.path.name}-{time.time_ns()}",
            storage_path=str(folder.ray) if launch.storage_path is None else below(launch.storage_path, ".ray"),
            failure_config=FailureConfig(max_failures=launch.max_failures),
        ),
    )


def scaling(launch: Ray, wanted: int, *, gpus: bool, stopping: Callable[[], bool]) -> ScalingConfig:
    """Return Ray Train's settings for a group of `wanted` workers, or of as many as fit in time."""
    whole = ScalingConfig(
        num_workers=wanted,
        use_gpu=gpus,
        resources_per_worker=launch.resources_per_worker or None,
        placement_strategy=launch.placement,
    )
    if not launch.elastic:
        return whole
    worker = replace(whole, num_workers=1).total_resources
    fitting = workers_that_fit(wanted, least(launch.workers), worker, launch.placement, launch.resize_wait_s, stopping)
    if fitting < wanted and not stopping():
        print(
            f"distgrow: the cluster had no room for the {wanted} workers wanted within {launch.resize_wait_s:g} s "
            f"(launch.resize_wait_s); going on with {fitting}",
            file=sys.stderr,
            flush=True,
        )
    return replace(whole, num_workers=fitting)


def workers_that_fit(
    wanted: int, least: int, worker: Mapping[str, float], placement: str, wait_s: float, stopping: Callable[[], bool]
) -> int:
    """Return the number of workers, at most `wanted`, for which the cluster has room. Nothing is reserved.

    For `wait_s` seconds all of them are demanded, which an autoscaler can meet. After that, as many as fit are enough,
    but never fewer than `least`: Ray waits for those when it starts them.

    Args:
        wanted: Largest number of workers.
        least: Smallest number of workers.
        worker: Resources of one worker.
        placement: Ray's placement strategy.
        wait_s: Seconds to wait for all of them.
        stopping: Whether the run has been asked to stop.
    """

    def fits(workers: int, seconds: float) -> bool:
        group = placement_group([dict(worker)] * workers, strategy=placement)
        deadline = time.monotonic() + seconds
        try:
            while not group.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline or stopping():
                    return False
            return True
        finally:
            remove_placement_group(group)

    if wanted <= least or fits(wanted, wait_s):
        return wanted
    low, high = least, wanted
    while high - low > 1 and not stopping():
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, PLACEMENT_S) else (low, middle)
    return low
