"""Ray worker: what a rank does beside training so that faults of the cluster do no harm."""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import ray
from ray._private.state import state  # as Ray Train does, since no public function tells of a drained node
from ray.util.metrics import Gauge

from distgrow.core.errors import RunError
from distgrow.distributed.environment import head_patience_s
from distgrow.run.folder import RunFolder
from distgrow.tracking.base_event import Line


def start_watchers(folder: RunFolder) -> None:
    """Watch the head node and this host in threads until the process ends."""
    context = ray.get_runtime_context()
    _in_thread(lambda: _exit_without_head(context.gcs_address, head_patience_s()))
    node = context.get_node_id()
    _in_thread(lambda: _checkpoint_while_draining(folder, node))


def _in_thread(task: Callable[[], None]) -> None:
    threading.Thread(target=task, daemon=True).start()


def _exit_without_head(head: str, limit_s: float) -> None:
    """End this process if Ray's head has not answered for `limit_s` seconds.

    On a host that is cut off Ray notices this only after minutes. A rank there would wait for its peers for half an
    hour, and it may be the rank that writes into the run's folder.
    """
    answered = time.monotonic()
    while time.monotonic() - answered < limit_s:
        with suppress(OSError):
            check_reachable(head)
            answered = time.monotonic()
        time.sleep(min(5.0, limit_s / 4))
    print(f"distgrow: Ray's head {head} has not answered for {limit_s:.0f} s; this rank ends", flush=True)
    os._exit(1)


def wait_for_last_group(folder: RunFolder) -> None:
    """Wait until rank 0 of the previous worker group no longer writes. It may still live on a host that was cut off."""
    try:
        folder.lock()
    except RunError:
        print(f"distgrow: a rank of the last worker group still holds {folder.path}; it ends soon", flush=True)
        folder.lock(wait_s=4 * head_patience_s())
    folder.unlock()


def _checkpoint_while_draining(folder: RunFolder, node: str) -> None:
    """Ask for a checkpoint every five seconds while Ray drains this host, for example a spot instance.

    When the notice has run out, Ray Train moves the workers to other hosts, which resume from the newest checkpoint.
    """
    while True:
        time.sleep(5)
        with suppress(Exception):  # Ray's head may be away; the next try is soon enough
            if node in state.get_draining_nodes():
                print("distgrow: Ray drains this host; the run is checkpointed every five seconds", flush=True)
                folder.checkpoint.touch()


class Gauges:
    """Export the newest update's figures as Ray metrics, every half second at most, for dashboard and Prometheus."""

    FIGURES = ("step", "samples", "epoch", "stage", "batch", "lr", "loss", "grad_norm", "sfo", "samples_per_s")

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(f"distgrow_{name}", tag_keys=("run",)) for name in self.FIGURES}
        self._tags, self._next = {"run": run}, 0.0

    def log(self, event: Line) -> None:
        """Export the event if it has figures."""
        now = time.monotonic()
        if event["event"] == "step" and now < self._next:
            return
        self._next = now + 0.5
        for name, gauge in self._gauges.items():
            if event.get(name) is not None:
                gauge.set(event[name], self._tags)

    def close(self) -> None:
        """Do nothing."""


def check_reachable(address: str) -> None:
    """Check that something listens at host:port.

    Raises:
        OSError: at once if nothing does. Ray itself would retry for minutes.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
