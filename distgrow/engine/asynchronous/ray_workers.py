"""RayWorkers: asynchronous workers as Ray actors, of which others are started in place of those that die."""

import os
import sys
import time
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.distributed.environment import named_ray_cluster
from distgrow.distributed.world import joined
from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.asynchronous.workers import Came, Died, Gone, Job, Parts
from distgrow.engine.gradients import Gradient, Gradients

#: Seconds after which a wait looks whether any worker is there.
LOOK_S = 1.0
#: What is raised if a worker has died, or its answer with the host that held it.
_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError)


class _Worker:
    """Hold a copy of model and loss in a process of its own."""

    def __init__(self, parts: bytes, path: list[str]) -> None:
        sys.path.extend(entry for entry in path if entry not in sys.path)
        made: Parts = cloudpickle.loads(parts)
        with joined(made.spec.device) as world:
            device = str(world.device)
        self._gradients = Gradients(
            made.model, made.loss, spec=made.spec, clip=made.clip, device=device, items=made.items
        )

    def ready(self) -> None:
        """Return once the worker is there."""

    def compute(self, plan: Any, batches: Any, tensors: Any) -> Gradient:
        """Return the gradient of a batch at the given parameters and buffers."""
        self._gradients.move_to(tensors)
        return self._gradients.compute(plan, batches)


class _Slot:
    """Hold a place for a worker: the actor that has it, and what it does."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.there = False  #: it has answered before
        self.job: Job | None = None
        self.answer: Any = actor.ready.remote()  #: what is waited for; None: it has nothing to do


class RayWorkers:
    """Keep `spec.workers` actors, on the cluster that this process is connected to, else on a new one of this host."""

    def __init__(self, parts: Parts, spec: Async) -> None:
        """Start the workers; wait for all of them, or for `spec.wait_s` seconds.

        Raises:
            ConfigError: Model, loss or items cannot be pickled, or no host has a worker's resources.
        """
        try:
            pickled = cloudpickle.dumps(parts)  # pyright: ignore[reportPrivateImportUsage]
        except Exception as error:  # whatever pickling a user's objects raises
            raise ConfigError(
                f"engine.kind=async sends model, loss and items to its workers, which cannot be pickled: {error}; take "
                "out of them what cannot be, such as open files and locks, or use engine.kind=torch"
            ) from None
        self._spec, self._ours = spec, not ray.is_initialized()
        if self._ours:
            _connect(spec)
            self._check_hosts()  # no other host will come
        self._arguments = (ray.put(pickled), list(sys.path))
        self._seen = time.monotonic()  # when a worker was last there
        self._slots = [self._started() for _ in range(spec.workers)]
        while not all(slot.there for slot in self._slots) and time.monotonic() - self._seen < spec.wait_s:
            began = self._seen
            self._look(LOOK_S)
            self._seen = began
        if not any(slot.there for slot in self._slots):
            self._check_hosts()
        self._seen = time.monotonic()

    def _check_hosts(self) -> None:
        if lacking := _lacking(_wanted(self._spec)):
            self.close()
            raise ConfigError(f"engine.kind=async: {lacking}")

    def _started(self) -> _Slot:
        resources = _wanted(self._spec)
        options: dict[str, Any] = {"num_cpus": resources.pop("CPU", 0), "num_gpus": resources.pop("GPU", 0)}
        # not in the placement group of the rank, which has no room for others
        make = ray.remote(_Worker).options(**options, resources=resources, max_restarts=0, scheduling_strategy="SPREAD")
        return _Slot(make.remote(*self._arguments))

    def keep(self, value: Any) -> Any:
        """See Workers."""
        return ray.put(value)

    def value(self, kept: Any) -> Any:
        """See Workers."""
        return ray.get(kept)

    def idle(self) -> bool:
        """See Workers."""
        return any(slot.answer is None for slot in self._slots)

    def hand_out(self, job: Job, tensors: Any) -> None:
        """See Workers."""
        slot = next(slot for slot in self._slots if slot.answer is None)
        slot.job, slot.answer = job, slot.actor.compute.remote(job.plan, job.batches, tensors)

    def next(self, *, block: bool) -> Came | Died | Gone | None:
        """See Workers."""
        while True:
            happened, found = self._look(LOOK_S if block else 0.0)
            if found or not block:
                return happened
            if any(slot.there for slot in self._slots):
                self._seen = time.monotonic()
            elif time.monotonic() - self._seen > self._spec.wait_s:
                self._seen = time.monotonic()
                lacking = _lacking(_wanted(self._spec))
                return Gone(why=f": {lacking}" if lacking else "")

    def _look(self, timeout_s: float) -> tuple[Came | Died | None, bool]:
        """Wait for one answer. Return what it is, and whether there was any."""
        waiting = {slot.answer: k for k, slot in enumerate(self._slots) if slot.answer is not None}
        answers, _ = ray.wait(list(waiting), timeout=timeout_s) if waiting else ([], [])
        if not answers:
            return None, False
        k = waiting[answers[0]]
        slot = self._slots[k]
        try:
            gradient = ray.get(answers[0])
        except _LOST as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise TrainingFailed(f"a worker of engine.kind=async cannot start: {error}") from None
            ray.kill(slot.actor)  # it may live on, where it cannot be reached
            self._slots[k] = self._started()
            return (None if slot.job is None else Died(job=slot.job)), True
        except RayTaskError as error:
            raise error.cause from error
        job, slot.job, slot.answer, slot.there = slot.job, None, None, True
        self._seen = time.monotonic()
        return (None if job is None else Came(job=job, gradient=gradient)), True

    def close(self) -> None:
        """See Workers."""
        if not ray.is_initialized():
            return
        for slot in self._slots:
            ray.kill(slot.actor)
        if self._ours:
            ray.shutdown()


def _wanted(spec: Async) -> dict[str, float]:
    """Return the resources of a worker."""
    return dict(spec.resources) or {"CPU": 1, **({"GPU": 1} if spec.device == "cuda" else {})}


def _lacking(wanted: dict[str, float]) -> str | None:
    """Return what no host of the cluster has, in words; None if one has a worker's resources in all."""
    hosts: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(host.get(name, 0) >= amount for name, amount in wanted.items()) for host in hosts):
        return None
    shown = ", ".join(f"{name}: {amount:g}" for name, amount in wanted.items())
    most = ", ".join(f"{name}: {max((host.get(name, 0) for host in hosts), default=0):g}" for name in wanted)
    return (
        f"no host has engine.resources={{{shown}}} of a worker, the most that any has is {most}: lower "
        "engine.resources, or start Ray on a host that has them"
    )


def _connect(spec: Async) -> None:
    """Connect to the cluster in RAY_ADDRESS, else start one on this host that has room for the workers."""
    if (address := named_ray_cluster()) is not None:
        ray.init(address=address)
    else:
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, spec.workers), include_dashboard=False)
