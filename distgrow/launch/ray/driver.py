"""Ray driver: the same run in a worker group of Ray Train. Only the files of this folder import ray."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from distgrow.core.errors import ConfigError, RunError, TrainingFailed
from distgrow.core.scaling import least, most
from distgrow.distributed.environment import name_interface, name_ray_cluster, named_ray_cluster, ray_train_settings
from distgrow.distributed.hang_watch import LostPeer, failed_collective
from distgrow.distributed.world import joined
from distgrow.launch.base import Job
from distgrow.launch.elastic import groups, launching
from distgrow.launch.ray.group import worker_group
from distgrow.launch.ray.spec import Ray
from distgrow.launch.ray.worker import Gauges, check_reachable, start_watchers, wait_for_last_group
from distgrow.run.folder import RunFolder
from distgrow.run.resume_mode import ResumeMode

#: Makes a job of the plain values that a host is sent.
Reader = Callable[[dict[str, Any]], Job]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainLoopConfig:
    """Hold what every process of a run must know, as plain values that travel between hosts."""

    run: dict[str, Any]
    rebudget: bool  #: whether a run that goes on with another budget may change what it has planned
    path: list[str]  #: sys.path of the driver, where the user's own modules are found
    gpus: bool
    asked: int | None = (
        None  #: workers that the group's first stage wants, if groups of other sizes may follow; else None
    )


def train(job: Job, *, resume: ResumeMode, rebudget: bool) -> None:
    """Train on `launch.workers` Ray workers.

    The cluster is the one of launch.address or RAY_ADDRESS, else a new local one. On an existing cluster the training
    goes on to its end if this process is killed.

    Raises:
        ConfigError: or any other error for users that the first failed worker raised.
        RuntimeError: with the worker's traceback for all other errors.
    """
    folder = RunFolder(Path(job.run.dir).absolute())
    folder.check(resume=resume.resumes(folder.begun))
    placed = job.kept_in(str(folder.path))
    read = type(job).model_validate
    with _cluster(job) as (address, gpus):
        config = TrainLoopConfig(run=placed.model_dump(mode="json"), rebudget=rebudget, path=sys.path, gpus=gpus)
        failure = (
            _train_here(read, config, folder) if address is None else _train_detached(read, config, folder, address)
        )
    if failure is not None:
        raise failure


def _train_here(read: Reader, config: TrainLoopConfig, folder: RunFolder) -> Exception | None:
    """Run the trainer in this process. A local cluster ends with this process anyway."""
    folder.stop_requested()  # drop a request that was left over: it is not meant for this run
    with _requesting_stop_on(folder, *_stop_signals(config)):
        failure = _train_groups(read, config)
    folder.stop_requested()
    return failure


def _train_detached(read: Reader, config: TrainLoopConfig, folder: RunFolder, address: str) -> Exception | None:
    """Run the trainer in an actor on Ray's head node and wait for it. It survives this process and this host."""
    trainer = _create_actor(folder, address)
    folder.stop_requested()  # drop a request that was left over: it is not meant for this run
    stop = f"touch {folder.stop}"
    print(f"distgrow: should this command be killed, the run goes on; to end it: {stop}", file=sys.stderr, flush=True)
    try:
        with _requesting_stop_on(folder, *_stop_signals(config), signal.SIGINT):
            failure: Any = ray.get(trainer.train.remote(read, asdict(config)))
    except RayActorError as error:
        raise TrainingFailed(f"Ray has lost the run; the newest checkpoint is good for --resume ({error})") from None
    folder.stop_requested()
    ray.kill(trainer)
    return failure


def _create_actor(folder: RunFolder, address: str) -> Any:
    """Create an actor for the run in this folder.

    Raises:
        RunError: if an actor already trains this run.
    """
    make = ray.remote(_TrainerActor).options(
        name=str(folder.path.resolve()),
        namespace="distgrow",
        lifetime="detached",
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
        max_concurrency=2,
        runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1", **ray_train_settings()}},
    )
    for _ in range(100):
        try:
            return make.remote()
        except ValueError:  # the name is taken
            _remove_ended_actor(folder, address)
            time.sleep(0.1)
    raise TrainingFailed(f"Ray does not let go of the actor {folder.path.resolve()}; try again")


def _remove_ended_actor(folder: RunFolder, address: str) -> None:
    """Remove this folder's actor if its run has ended.

    Raises:
        RunError: if the actor still trains.
    """
    try:
        actor = ray.get_actor(str(folder.path.resolve()), namespace="distgrow")
        is_training = ray.get(actor.is_training.remote())
    except (ValueError, RayActorError):  # it has just ended
        return
    if is_training:
        raise RunError(
            f"run.dir={folder.path} is being trained on the Ray cluster {address} already; follow it on Ray's "
            f"dashboard or with 'tail -f {folder.metrics}', or end it after a checkpoint with 'touch {folder.stop}'"
        )
    ray.kill(actor)


class _TrainerActor:
    """Hold the trainer of a run in an actor of its own, which ends with the run."""

    def __init__(self) -> None:
        self._is_training = True
        self._unused = threading.Timer(60, os._exit, (0,))
        self._unused.start()

    def train(self, read: Reader, config: dict[str, Any]) -> Exception | None:
        """Train to the end. Return the error of the first failed worker, or None."""
        self._unused.cancel()
        try:
            return _train_groups(read, TrainLoopConfig(**config))
        finally:
            self._is_training = False
            threading.Timer(5, os._exit, (0,)).start()  # by then a driver that lives has the answer

    def is_training(self) -> bool:
        """Return whether the run is still going on."""
        return self._is_training


def _train_groups(read: Reader, config: TrainLoopConfig) -> Exception | None:
    """Train in worker groups of Ray Train, each of the size that its stages want.

    A group that asked for another size is followed by the next one, which resumes from the last checkpoint.

    Returns:
        The error that ended the run, or None.
    """
    _extend_module_path(config.path)  # the user's task may be needed for the size of its data set
    job = read(config.run)
    launch, folder = job.launch, RunFolder(job.run.dir)
    assert isinstance(launch, Ray), "only launch.kind=ray trains here"
    try:
        with launching(folder) if launch.elastic else nullcontext():
            for num_workers in groups(job, folder):
                loop = asdict(replace(config, asked=num_workers if launch.elastic else None))
                worker_group(
                    partial(_worker, read), loop, launch, folder, num_workers=num_workers, gpus=config.gpus
                ).fit()
    except TrainingFailedError as error:
        return _first_failure(error)
    except (ConfigError, TrainingFailed) as error:
        return error
    return None


def _extend_module_path(path: list[str]) -> None:
    """Put the driver's module search path on this process' path, so that the user's own modules are found."""
    sys.path.extend(entry for entry in path if entry not in sys.path)


def _worker(read: Reader, config: dict[str, Any]) -> None:
    """Run one rank in a Ray process, inside the process group that Ray Train made.

    The driver has checked the folder. After a failure Ray calls this again, and the run resumes.
    """
    _extend_module_path(config["path"])
    job = read(config["run"])
    folder = RunFolder(job.run.dir)
    start_watchers(folder)
    with joined(job.engine.device, job.launch.timeout_s) as world:
        world.on_rank0(lambda: wait_for_last_group(folder))
    job.fit(
        resume=ResumeMode.EITHER,
        rebudget=config["rebudget"],
        asked=config["asked"],
        trackers=[Gauges(job.run.dir)],
    )


@contextmanager
def _cluster(job: Job) -> Iterator[tuple[str | None, bool]]:
    """Connect to a Ray cluster while the context lasts.

    Yields:
        The cluster's address (None for a local one), and whether workers get GPUs.
    """

    def prepare() -> None:  # in here it is pickled by value: Ray's helpers, of which a run has many, load no torch
        """Prepare a Ray process, before Ray Train makes the process group in it."""
        name_interface(ray.util.get_node_ip_address())
        name_ray_cluster(ray.get_runtime_context().gcs_address)

    launch = job.launch
    assert isinstance(launch, Ray), "only launch.kind=ray trains here"
    address = launch.address or named_ray_cluster()
    runtime_env = {"worker_process_setup_hook": prepare}
    if address is None:
        cpus = max(os.cpu_count() or 1, most(launch.workers) + job.engine.actors)
        ray.init(address="local", num_cpus=cpus, runtime_env=runtime_env)
    else:
        try:
            check_reachable(address)
            ray.init(address=address, runtime_env=runtime_env)
        except (OSError, ValueError) as error:  # ConnectionError among them; no address at all
            raise ConfigError(
                f"launch.address={address}: no Ray cluster answers there; start one (ray start --head), "
                f"correct the address, or leave it out for a local one ({error})"
            ) from None
    try:
        enough = ray.cluster_resources().get("GPU", 0) >= least(launch.workers)
        yield address, job.engine.device == "cuda" or (job.engine.device == "auto" and enough)
    finally:
        ray.shutdown()


def _stop_signals(config: TrainLoopConfig) -> set[signal.Signals]:
    """Return the signals that stop the run, but Ctrl-C, which a local Ray answers itself."""
    names = {"SIGTERM", *config.run["run"]["stop_signals"]} - {"SIGINT"}
    return {signal.Signals[name] for name in names}


@contextmanager
def _requesting_stop_on(folder: RunFolder, *signals: signal.Signals) -> Iterator[None]:
    """Turn signals to the driver into a request that the workers write a checkpoint and end.

    A second signal ends the driver.
    """
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        folder.request_stop()
        signal.signal(number, before[number])

    for number in signals:
        before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(error: TrainingFailedError) -> Exception:
    """Return the error of the worker that failed first. Peers that only lost it fail later."""
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return RuntimeError("".join(traceback.format_exception(error)))
    failures = error.worker_failures
    causes = {rank: getattr(error, "cause", None) or error.__cause__ or error for rank, error in failures.items()}
    rank, cause = min(causes.items(), key=lambda item: (_is_lost_peer(item[1]), item[0]))
    if isinstance(cause, ConfigError | TrainingFailed):
        return cause
    return RuntimeError(f"worker {rank} failed first:\n{''.join(traceback.format_exception(cause))}")


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, LostPeer) or failed_collective(error) or "connectFullMesh" in str(error)
