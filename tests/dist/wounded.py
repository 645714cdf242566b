"""A task with faults that are injected by name: the digits, whose model, loss and data look for their moment."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow.data.dataset import Batched
from distgrow.data.datasets import digits


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Memory(nn.Module):
    """A layer that runs out of memory where a micro-batch has more than `rows` rows, forward or backward."""

    def __init__(self, rows: int, way: str, ranks: list[int], evaluating: bool) -> None:
        super().__init__()
        self.rows, self.way, self.ranks, self.evaluating = rows, way, ranks, evaluating

    def forward(self, x: Tensor) -> Tensor:
        looked_at = rank() in self.ranks and self.training != self.evaluating
        return _Full.apply(x, self.way if looked_at and len(x) > self.rows else "")


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: str) -> Tensor:
        ctx.way = way
        if way == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.way == "backward":
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return grads[0], None


def small(
    rows: int = 4, way: str = "forward", ranks: list[int] | None = None, norm: bool = False, evaluating: bool = False
) -> Any:
    """A model on ranks that cannot hold more than `rows` rows, in training or evaluating; `norm`: with BatchNorm."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 32), *([nn.BatchNorm1d(32)] if norm else [])]
    model = nn.Sequential(
        *layers, nn.ReLU(), Memory(rows, way, ranks or [0 if evaluating else 1], evaluating), nn.Linear(32, 10)
    )
    return model, loss, *digits()


class Heavy(Tensor):
    """Rows that the second rank cannot place on its device the fifth time, before any forward."""

    placed = 0

    def to(self, *device: Any, **options: Any) -> Tensor:
        Heavy.placed += 1
        if Heavy.placed == 5 and rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return self.as_subclass(Tensor).to(*device, **options)


class HeavyRows(Batched):
    """The rows of a data set, heavy."""

    def __init__(self, rows: Batched) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Any, seeds: Any) -> Any:
        inputs, labels = self.rows.batch(indices, seeds)
        return inputs.as_subclass(Heavy), labels


def unplaceable() -> Any:
    """A model with BatchNorm, and heavy rows."""
    model, loss, train, test = small(rows=99, norm=True)
    return model, loss, HeavyRows(train), test


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def limited(megabytes: int = 300, who: int = 1) -> Any:
    """A rank that may take so much more memory from its first update on; a row's activations take a megabyte."""
    import resource

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1 << 18), nn.ReLU(), nn.Linear(1 << 18, 10))
    lowered = False

    def bounded(model: nn.Module, batch: Any) -> Tensor:
        nonlocal lowered
        if not lowered and rank() == who:
            lowered = True
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, resource.RLIM_INFINITY))
        return loss(model, batch)

    return model, bounded, *digits()


def deadly(fault: str, mark: str, who: int = 1, after: int = 12) -> Any:
    """A worker that dies, hangs or fails once, at the named place; the file `mark` says that it has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    wound = Wound(Path(mark), who)
    FAULTS[fault](wound, model, after)

    def watched(model: nn.Module, batch: Any) -> Tensor:
        wound.calls += model.training
        wound.rows = len(batch[0])
        wound.look()
        return loss(model, batch)

    return model, watched, *digits()


class Wound:
    """What a fault knows of the run, and whether it has happened."""

    def __init__(self, mark: Path, who: int) -> None:
        self.mark, self.who = mark, who
        self.calls, self.rows, self.hanging = 0, 0, False
        self.look: Callable[[], None] = lambda: None

    def once(self) -> bool:
        """Whether it is this rank's moment, for the first time in the run."""
        if rank() != self.who or self.mark.exists():
            return False
        self.mark.touch()
        return True

    def die(self) -> None:
        if self.once():
            os.kill(os.getpid(), signal.SIGKILL)


def in_forward(wound: Wound, model: nn.Module, after: int) -> None:
    """Killed while it computes a loss."""
    wound.look = lambda: wound.die() if wound.calls == after else None


def in_all_reduce(wound: Wound, model: nn.Module, after: int) -> None:
    """Killed in the backward pass, its last gradient not handed over: the others wait in the all-reduce."""
    first = next(model.parameters())
    first.register_hook(lambda _: wound.die() if wound.calls == after else None)


def at_transition(wound: Wound, model: nn.Module, after: int) -> None:
    """Killed in the first update of a larger batch."""
    begin: list[int] = []

    def look() -> None:
        begin.append(wound.rows)
        if wound.rows > begin[0]:
            wound.die()

    wound.look = look


def in_checkpoint(wound: Wound, model: nn.Module, after: int) -> None:
    """Killed when half of a checkpoint's file is written, the first checkpoint of all apart."""
    fsync = os.fsync

    def die(descriptor: int) -> None:
        if wound.calls >= after and wound.once():
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = die


def in_resume(wound: Wound, model: nn.Module, after: int) -> None:
    """Killed in forward, and once more while it reads the checkpoint to go on from."""
    in_forward(wound, model, after)
    again, load = Wound(wound.mark.with_suffix(".again"), wound.who), torch.load

    def die(*args: Any, **options: Any) -> Any:
        again.die()
        return load(*args, **options)

    torch.load = die


def storage_fails_once(wound: Wound, model: nn.Module, after: int) -> None:
    """A file system that cannot write one file of a checkpoint, once, and then can again."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        stored = "/checkpoints/" in str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if stored and wound.calls >= after and wound.once():
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    os.fsync = fail


def slow_storage(wound: Wound, model: nn.Module, after: int) -> None:
    """A disk that takes a tenth of a second for a file, in a run that takes `after` milliseconds for an update."""
    fsync = os.fsync
    wound.look = lambda: time.sleep(after / 1000)

    def wait(descriptor: int) -> None:
        if wound.calls:
            time.sleep(0.1)
        fsync(descriptor)

    os.fsync = wait


def hangs(wound: Wound, model: nn.Module, after: int) -> None:
    """Stays away from the all-reduce for ever."""

    def look() -> None:
        while wound.calls == after and (wound.hanging or wound.once()):
            wound.hanging = True
            time.sleep(3600)

    wound.look = look


FAULTS: dict[str, Callable[[Wound, nn.Module, int], None]] = {
    "in forward": in_forward,
    "in the all-reduce": in_all_reduce,
    "at a growth transition": at_transition,
    "during a checkpoint": in_checkpoint,
    "during resume": in_resume,
    "storage fails once": storage_fails_once,
    "slow storage": slow_storage,
    "hangs": hangs,
}
