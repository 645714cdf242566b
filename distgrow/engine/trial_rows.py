"""Rows that are looked at before training: how they are drawn and placed, and how a module is left as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from distgrow.data.loader import outlive_signals, shared_memory_told
from distgrow.data.stream import Stream
from distgrow.engine.batches import Buffers, map_leaves, place

#: Positions in the sample stream; one may occur several times.
Rows = tuple[int, ...]
#: Rows of the training set, and of the test set, that are looked at.
ROWS = 8


def draw(stream: Stream, batches: Sequence[Rows], workers: int) -> dict[Rows, Any]:
    """Return the collated rows of each batch.

    With `workers` one loader process draws them: a data set may open files at its first row, and processes that are
    started later would share them.
    """
    if not workers:
        return {rows: stream.__getitems__(rows) for rows in batches}
    dataset, sampler = cast(Any, stream), cast(Any, batches)
    loaded = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=1,
        prefetch_factor=1,
        worker_init_fn=outlive_signals,
    )
    drawn, rows = dict[Rows, Any](), max(map(len, batches))
    with shared_memory_told(
        f"the few micro-batches of {rows} rows that a loader process draws before the run begins; set "
        f"run.loader.workers=0 in place of {workers}"
    ):
        for numbers, batch in zip(batches, loaded, strict=True):
            drawn[numbers] = map_leaves(_copied, batch)  # so that shared memory holds few at a time
    return drawn


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _as_is(batch: Any) -> Any:
    return batch


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Restore the modes and buffers of a module when the context ends."""
    modes, buffers = {part: part.training for part in module.modules()}, Buffers(module)
    try:
        yield
    finally:
        buffers.restore()
        for part, training in modes.items():
            part.training = training


def placed(batch: Any, module: nn.Module) -> Any:
    """Return a batch on the device and in the precision of a module's first parameter."""
    first = next(module.parameters(), torch.empty(0))
    dtype = first.dtype if first.is_floating_point() and first.dtype != torch.float32 else None
    return place(batch, first.device, dtype)
