"""Ranks that run blocks of updates when they are asked to, and tell seconds and bytes sent; decides nothing itself.

`scale.py` starts this file, under torchrun or as one rank of a simulated world, and asks by a line of JSON on stdin:
{"model": …, "batch": …, "updates": …}. The first rank answers each with a line on stdout; the end of stdin ends all.
"""

import argparse
import json
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loops import build, build_job
from overhead import distgrow_block
from paired import Block
from torch._C._distributed_c10d import HashStore

from distgrow.core.order import Int64s, UInt64s
from distgrow.data.dataset import Batched
from distgrow.distributed.world import World, joined
from distgrow.engine.spec import Torch
from distgrow.growth.constant import Constant
from distgrow.launch.local import leave

MICRO = 64  #: rows of a micro-batch, at most
BYTES_SENT = 200  #: where Linux's struct tcp_info keeps tcpi_bytes_sent, since 4.19


def bytes_sent() -> int:
    """Payload that the kernel has sent, again where it was lost, over the TCP connections that this process holds."""
    return sum(map(sent_by, Path("/proc/self/fd").iterdir()))


def sent_by(descriptor: Path) -> int:
    """Payload that one of this process' file descriptors has sent; 0 where it is no TCP connection."""
    try:
        if not stat.S_ISSOCK(descriptor.stat().st_mode):
            return 0
        with socket.socket(fileno=os.dup(int(descriptor.name))) as other:
            if other.family not in (socket.AF_INET, socket.AF_INET6) or other.type != socket.SOCK_STREAM:
                return 0
            return struct.unpack_from("Q", other.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), BYTES_SENT)[0]
    except FileNotFoundError:  # the folder's own
        return 0


class Repeated(Batched):
    """A data set as often after itself as makes it endless: a rank of a large world needs a row of its own."""

    def __init__(self, arrays: Any) -> None:
        self.arrays, self.rows = arrays, len(arrays)

    def __len__(self) -> int:
        return 10**12

    def batch(self, indices: Int64s, seeds: UInt64s) -> Any:
        """See distgrow.data.dataset.Batched."""
        return self.arrays.batch(indices % self.rows, seeds)


class Blocks:
    """Blocks of updates of real runs, each going on where it ended."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self._made: dict[str, Block] = {}

    def __call__(self, model: Any, batch: int, updates: int) -> tuple[float, int]:
        """Seconds of a block of updates on all ranks, and bytes that this rank has sent meanwhile. Collective."""
        key = f"{model}-{batch}-{updates}"
        if key not in self._made:
            task, growth = build(model), Constant(start=batch)
            task = replace(task, train=Repeated(task.train))
            engine, folder = Torch(device="cpu", max_micro=MICRO), self.folder / key
            job = build_job(task, self.world, growth, engine=engine, folder=folder)
            self._made[key] = distgrow_block(job, updates, self.world)
        before = bytes_sent()
        seconds = self._made[key]()
        self.world.sum([0.0])  # whatever it has handed to the kernel has arrived by then
        return seconds, bytes_sent() - before


class Done(dist.Work):
    """A collective that is over."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """It is over."""
        return True

    def get_future(self) -> Any:
        """Its tensors."""
        return self._future


class Lonely(dist.ProcessGroup):
    """One rank of a group none of whose others exists: all of them would have what it has.

    torch's own fake group does not go with DistributedDataParallel: its collectives have no result.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]

    def allreduce(self, tensors: Any, opts: Any = None) -> Done:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The sum of as many as there would be."""
        for tensor in tensors:
            tensor.mul_(self.size())
        return Done(tensors)

    def broadcast(self, tensors: Any, opts: Any = None) -> Done:  # pyright: ignore[reportIncompatibleMethodOverride]
        """This rank's."""
        return Done(tensors)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Done:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The others have the same."""
        for places, tensor in zip(outputs, inputs, strict=True):
            for place in places:
                place.copy_(tensor)
        return Done(outputs)


@contextmanager
def simulated(size: int) -> Iterator[World]:
    """The first of `size` ranks, without the others."""
    dist.Backend.register_backend("lonely", lambda store, rank, size, timeout: Lonely(rank, size), devices=["cpu"])
    dist.init_process_group("lonely", rank=0, world_size=size, store=HashStore())
    yield World(size=size)
    dist.destroy_process_group()


def serve(world: World, *, alone: bool) -> None:
    """Answer until stdin ends. Collective: every rank must call."""
    with tempfile.TemporaryDirectory() as folder:
        blocks = Blocks(world, Path(folder))
        while line := sys.stdin.readline() if alone else world.on_rank0(sys.stdin.readline):
            seconds, sent = blocks(**json.loads(line))
            everybody = [sent] if alone else world.gather(sent)
            if world.rank == 0:
                print(json.dumps({"seconds": seconds, "sent": everybody}), flush=True)


def main() -> None:
    """Join and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", type=int, help="be the first of so many ranks, without the others")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with simulated(options.simulate) if options.simulate else joined("cpu", timeout_s=3600) as world:
        serve(world, alone=world.size == 1 or bool(options.simulate))
    leave()


if __name__ == "__main__":
    main()
