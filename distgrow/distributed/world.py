"""World: this process among all ranks, and the few collectives that are not gradients."""

import pickle
import platform
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.distributed.environment import local_rank_named, place
from distgrow.distributed.hang_watch import watching_for_hangs

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]
#: The key in the store of the newest group's name.
_NAME = "distgrow/group"
#: Lines of /proc/cpuinfo that say of which make a processor is, on x86 and on ARM.
_MAKE = ("model name", "flags", "Features", "CPU implementer", "CPU part")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Describe this rank and its peers. A world of size 1 needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    same_hardware: bool = (
        False  #: all ranks compute on the same make of machine: from equal numbers the same, bit by bit
    )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum `values` over all ranks, in float64 on the CPU. Collective: every rank must call."""
        return self.sum_async(values)()

    def sum_async(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Start a sum over all ranks and return a function that waits for it. Collective: every rank must call."""
        if self.size == 1:
            return lambda: list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        under_way: Any = dist.all_reduce(tensor, async_op=True)

        def wait() -> list[float]:
            under_way.wait()
            return tensor.tolist()

        return wait

    def mean_async(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Average `values` over ranks so that all ranks decide alike. Collective: every rank must call.

        All ranks have computed `values` from equal tensors. On identical hardware they are equal bit by bit, and
        nothing is communicated. On other hardware the last bits may differ.
        """
        if self.same_hardware:
            return lambda: list(values)
        return self.sum_async([value / self.size for value in values])

    def on_rank0(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0. Every rank returns its result, or raises its error.

        Collective: every rank must call.
        """
        if self.size == 1:
            return action()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = action()
            except Exception as error:  # passed on to every rank, so that none waits for a rank that gave up
                box[1] = _sendable(error)
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank. If one fails, every rank raises its error. Collective: every rank must call."""
        if self.size == 1:
            return action()
        result: Any = None
        failure = None
        try:
            result = action()
        except Exception as error:  # passed on, so that none waits for a rank that gave up
            failure = _sendable(error)
        for told in self.gather(failure):
            if told is not None:
                raise told
        return result

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, ordered by rank. Collective: every rank must call."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite `tensors` with their sums over all ranks. Collective: every rank must call."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite `tensors` with those of the first rank. Collective: every rank must call."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def exchange(self, sent: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send a flat tensor to each rank, and return those that the ranks send here. Collective: every rank must call.

        Args:
            sent: A tensor for each rank, of one dtype and device.
            sizes: How many numbers each rank sends here.
        """
        received = sent[0].new_empty(sum(sizes))
        dist.all_to_all_single(received, torch.cat(list(sent)), list(sizes), [len(tensor) for tensor in sent])
        return list(received.split(list(sizes)))


def _sendable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with its traceback as text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever a user's class does while it is pickled
        return RuntimeError("".join(traceback.format_exception(error)))


def _fresh_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Return the ranks' shared store, without the keys of groups before.

    These processes may have joined one before, and torchrun's own store outlives ranks that have died. So rank 0 gives
    each group a new name. The group is complete once every rank has answered to it, and each finds its answer in it.

    Raises:
        DistStoreError: A rank has not answered within the timeout.
    """
    store, *_ = next(rendezvous("env://", rank, size, timeout=timeout))
    mine, until = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set(_NAME, mine)
        answers = [store.get(f"{mine}/{other}") for other in range(1, size)]
        store.set(f"{mine}/all", b" ".join(answers).decode())
        return PrefixStore(mine, store)
    while time.monotonic() < until:
        name = store.get(_NAME).decode()
        store.set(f"{name}/{rank}", mine)
        with suppress(dist.DistStoreError):  # an old name is never answered again
            store.wait([f"{name}/all"], timedelta(seconds=0.5))
            if mine in store.get(f"{name}/all").decode().split():
                return PrefixStore(name, store)
        time.sleep(0.02)
    raise dist.DistStoreError(f"rank 0 has not named a group within {timeout}")


@contextmanager
def joined(device: Device = "auto", timeout_s: float = 600, *, alone: bool = False) -> Iterator[World]:
    """Join the process group that the environment describes, and leave it when the context ends.

    An existing process group (for example Ray Train's) is used and left as it is.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout_s: Seconds that a rank waits for the others before LostPeer names the missing rank.
        alone: Whether a single process makes a process group too.

    Yields:
        The World of this rank.
    """
    rank, size, local_rank = place()
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    where = _pick(device, local_rank)
    ours = (size > 1 or alone) and not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        store = _fresh_store(rank, size, timeout) if size > 1 else HashStore()
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    world = World(rank=rank, size=size, device=where)
    roll = watching_for_hangs(rank, size) if size > 1 else nullcontext()
    with local_rank_named() if alone else nullcontext(), roll:
        yield replace(world, same_hardware=len(set(world.gather(_machine(where)))) == 1)
    if ours:  # after an error the group stays until the process ends, so that the error is told before others lose us
        dist.destroy_process_group()


def _machine(device: torch.device) -> tuple[str, ...]:
    """Return what the last bits of a sum depend on: processor, threads, device."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = sorted({line for line in lines if line.startswith(_MAKE)})
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    kernels = torch.backends.cpu.get_cpu_capability()
    return (torch.__version__, platform.machine(), kernels, str(torch.get_num_threads()), *cpu, *gpu)


def _pick(device: Device, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda, but torch sees no GPU here; use auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this host has {counted(torch.cuda.device_count(), 'GPU')}, fewer than its ranks; start one rank per GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
