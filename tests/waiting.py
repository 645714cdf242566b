"""Count what makes the host wait for a device, or for the hosts of other ranks, between two updates."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distgrow.core.plan import Plan
from distgrow.distributed.world import World
from distgrow.engine.protocol import Engine
from distgrow.engine.untold import HostCopy


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number of it."""

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.where: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in self.READS:
            self.where.append("".join(traceback.format_stack(limit=8)))
        return func(*args, **(kwargs or {}))


@contextmanager
def reading(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count what reads numbers of tensors without a dispatched operator, and what hosts do together, too."""
    for name in ("tolist", "numpy"):
        real = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, real: Callable[..., Any] = real, **named: Any) -> Any:
            waits.where.append("".join(traceback.format_stack(limit=8)))
            return real(tensor, *args, **named)

        monkeypatch.setattr(Tensor, name, counted)
    for name in ("sum", "on_rank0", "gather"):
        together = getattr(World, name)

        def joined(world: World, *args: Any, together: Callable[..., Any] = together) -> Any:
            waits.where.append("".join(traceback.format_stack(limit=8)))
            return together(world, *args)

        monkeypatch.setattr(World, name, joined)
    with waits:
        yield


def check_updates_wait_for_nothing(
    engine: Engine, plan: Plan, batches: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that no update reads a number of the device but what the one before it left, or waits for other hosts.

    The pretended device is behind: a copy to the host may be read once the next update has been begun.

    Args:
        engine: The engine, before its first update.
        plan: Of every update, with two micro-batches.
        batches: Of all updates, two for each. Those of the first four are made twice.
        monkeypatch: Pytest's.
    """
    begun, written = count(1), dict[int, int]()
    now = 0
    real, copied = HostCopy.numbers, HostCopy.__init__

    def begin(copy: HostCopy, tensors: Any) -> None:
        copied(copy, tensors)
        written[id(copy)] = now

    def numbers(copy: HostCopy) -> list[float]:
        assert written[id(copy)] < now, "the host reads what the present update is still computing"
        waiting.where, kept = [], waiting.where
        values = real(copy)
        waiting.where = kept
        return values

    monkeypatch.setattr(HostCopy, "__init__", begin)
    monkeypatch.setattr(HostCopy, "numbers", numbers)
    waiting = Waits()
    for _ in range(2):  # the first of its size is waited for
        now = next(begun)
        engine.update(plan, batches[:2])
    with reading(waiting, monkeypatch):
        for k in range(2, len(batches), 2):
            now = next(begun)
            assert engine.update(plan, batches[k : k + 2]).told
    assert not waiting.where, waiting.where[0]
