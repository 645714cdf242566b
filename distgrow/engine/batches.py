"""Collated batches of any nesting, and the work on them that all engines share; knows no engine."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import Plan

Loss = Callable[[nn.Module, Any], Tensor]
#: Returns each metric of a collated batch: its mean over rows, or its (sum, count).
Metrics = Callable[[nn.Module, Any], Mapping[str, Any]]

#: The usual types of batches. They are tested first, since a test for Sequence takes many times longer.
_PLAIN = (tuple, list)


def checked_loss(loss: Any) -> Tensor:
    """Return the loss after a check.

    Raises:
        ConfigError: It is not one number with a gradient.
    """
    if not isinstance(loss, Tensor):
        raise ConfigError(f"the loss returned {type(loss).__name__}; it must return a tensor, the mean over the rows")
    if loss.dim() != 0:
        raise ConfigError(f"the loss has shape {tuple(loss.shape)}; it must be one number, the mean over the rows")
    if not loss.requires_grad:
        raise ConfigError("the loss has no gradient: no trainable parameter takes part, or it was detached")
    return loss


MORE_MEMORY = "use more workers, a smaller model, engine.kind=fsdp, or deepspeed with zero=3"


@contextmanager
def memory_for(what: str, remedy: str = MORE_MEMORY) -> Iterator[None]:
    """Turn a lack of memory inside the context into an error with a way out. No smaller attempt is possible.

    Raises:
        TrainingFailed: Memory does not hold `what`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        check_memory(error, what, remedy)
        raise


def check_memory(error: BaseException, what: str, remedy: str = MORE_MEMORY) -> None:
    """Check that the cause of `error` is not a lack of memory for `what`.

    Raises:
        TrainingFailed: It is. The message names a remedy.
    """
    if ran_out_of_memory(error):
        raise TrainingFailed(f"memory does not hold {what}; {remedy}") from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Return True if the memory of a GPU or the host was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def no_way_back(rank: int, micro: int, what: str) -> Iterator[None]:
    """End the run where memory does not hold what ranks do together: the others cannot be called back.

    Args:
        rank: This one.
        micro: Rows of a micro-batch.
        what: What cannot be repeated, for the message.

    Raises:
        TrainingFailed: It did not hold it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise TrainingFailed(
            f"rank {rank} ran out of memory with micro-batches of {counted(micro, 'row')}, within a step that {what} "
            "cannot "
            "repeat; " + (f"set engine.max_micro={micro // 2} and go on with --resume" if micro > 1 else MORE_MEMORY)
        ) from error


class Buffers:
    """Keep a copy of a model's buffers (BatchNorm's statistics), to undo an update that is not applied."""

    def __init__(self, model: nn.Module) -> None:
        self._now = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._now]

    def keep(self) -> None:
        """Copy the present values."""
        if self._now:
            torch._foreach_copy_(self._kept, self._now)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Restore the values of the last copy; if `where` is given, one truth value on the device, where that is so."""
        for now, kept in zip(self._now, self._kept, strict=True):
            now.copy_(kept if where is None else torch.where(where, kept, now))


def place(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return the batch on a device. Floating-point tensors are converted to `dtype` unless it is None."""
    if device.type == "cpu" and dtype is None:
        return batch

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, dtype=in_precision(leaf, dtype), non_blocking=True)
        if isinstance(leaf, PackedSequence):  # its batch_sizes stay on the CPU
            moved: Any = leaf.to(device=device)  # pyright: ignore[reportCallIssue]
            return moved.to(dtype) if dtype is not None and leaf.data.is_floating_point() else moved
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return map_leaves(move, batch)


def in_precision(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the type to convert a tensor to if floating-point numbers are to be `dtype`.

    The complex type for float64 is complex128. None: keep the tensor's own type.
    """
    if tensor.is_floating_point():
        return dtype
    return torch.complex128 if tensor.is_complex() and dtype == torch.float64 else None


def drawn_rows(plan: Plan, rank: int, batches: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Yield a rank's micro-batches of an update, each with the number of rows that the plan gives it.

    Raises:
        ConfigError: A micro-batch clearly has another number of rows.
    """
    for batch, rows in zip(batches, plan.sizes(rank), strict=True):
        check_rows(batch, rows)
        yield batch, rows


def check_rows(batch: Any, rows: int) -> None:
    """Check that the collation kept all rows and added none, as far as a batch of any layout shows it.

    A batch of n rows has a tensor with n among its sizes, or a list of length n. If it has neither, but tensors of
    several first sizes, it passes: it may be packed.

    Raises:
        ConfigError: All tensors have the same other number of rows.
    """
    if isinstance(batch, _PLAIN) and batch and isinstance(batch[0], Tensor) and rows in batch[0].shape:
        return  # the usual batch
    firsts: set[int] = set()
    for leaf in leaves_of(batch):
        if isinstance(leaf, Tensor):
            if rows in leaf.shape:
                return
            firsts |= set(leaf.shape[:1])
        elif leaf == rows:
            return
    if len(firsts) == 1:
        raise ConfigError(
            f"a micro-batch has {counted(firsts.pop(), 'row')} where the plan has {rows}; does task.collate add or "
            "drop some?"
        )


def leaves_of(batch: Any) -> Iterator[Tensor | int]:
    """Yield all tensors in nested tuples, lists, dicts and dataclasses, and each list's length before its items."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, _PLAIN) or (isinstance(batch, Sequence) and not isinstance(batch, str | bytes)):
        yield len(batch)
        for value in batch:
            yield from leaves_of(value)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves_of(value)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from leaves_of(getattr(batch, field.name))


def map_leaves(change: Callable[[Any], Any], batch: Any) -> Any:
    """Return the same nesting of tuples, lists, dicts and dataclasses, with `change` applied to every leaf."""
    if isinstance(batch, Tensor | PackedSequence):
        return change(batch)
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)
        for key, value in batch.items():
            changed[key] = map_leaves(change, value)
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(change, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_leaves(change, value) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        changed = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(changed, field.name, map_leaves(change, getattr(batch, field.name)))
        return changed
    return change(batch)
