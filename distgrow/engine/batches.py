"""Collated batches of any nesting, and what every engine does with them; knows no engine."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import Plan

Loss = Callable[[nn.Module, Any], Tensor]
#: Of a collated batch: each metric's mean over rows, or its (sum, count).
Metrics = Callable[[nn.Module, Any], Mapping[str, Any]]

#: What batches mostly are; asking whether they are a Sequence takes many times longer.
_PLAIN = (tuple, list)


def checked_loss(loss: Any) -> Tensor:
    """Return the loss. Raise ConfigError if it is not one number with a gradient."""
    if not isinstance(loss, Tensor):
        raise ConfigError(f"the loss returned {type(loss).__name__}; it must return a tensor, the mean over the rows")
    if loss.dim() != 0:
        raise ConfigError(f"the loss has shape {tuple(loss.shape)}; it must be one number, the mean over the rows")
    if not loss.requires_grad:
        raise ConfigError("the loss has no gradient: no trainable parameter takes part, or it was detached")
    return loss


MORE_MEMORY = "use more workers, a smaller model, or engine.kind=deepspeed with zero=3 or offload"


@contextmanager
def memory_for(what: str, remedy: str = MORE_MEMORY) -> Iterator[None]:
    """Raise TrainingFailed with a way out if memory does not hold what is done here. Nothing smaller can be tried."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        check_memory(error, what, remedy)
        raise


def check_memory(error: BaseException, what: str, remedy: str = MORE_MEMORY) -> None:
    """Check that `error` is not for want of memory for `what`.

    Raises:
        TrainingFailed: It is. The message says what a user can do.
    """
    if ran_out_of_memory(error):
        raise TrainingFailed(f"memory does not hold {what}; {remedy}") from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU's or the host's memory did not hold what was asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Buffers:
    """A model's buffers (BatchNorm's statistics), to be put back where an update comes to nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._now = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._now]

    def keep(self) -> None:
        """Remember them as they are."""
        if self._now:
            torch._foreach_copy_(self._kept, self._now)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self) -> None:
        """Make them what they were."""
        with torch.no_grad():
            for now, kept in zip(self._now, self._kept, strict=True):
                now.copy_(kept)


def place(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return the batch on a device, its floating-point tensors converted to `dtype` if that is not None."""
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
    """Return what a tensor becomes if floating-point numbers are to be `dtype`, complex ones pairs of them."""
    if tensor.is_floating_point():
        return dtype
    return torch.complex128 if tensor.is_complex() and dtype == torch.float64 else None


def drawn_rows(plan: Plan, rank: int, batches: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Yield a rank's micro-batches of an update with their numbers of rows, which are those of the plan.

    Raises:
        ConfigError: A micro-batch clearly has another number of rows.
    """
    for batch, rows in zip(batches, plan.sizes(rank), strict=True):
        check_rows(batch, rows)
        yield batch, rows


def check_rows(batch: Any, rows: int) -> None:
    """Check that a collation has kept all rows and added none, as far as a batch of any layout shows it.

    Somewhere a batch of n rows has a tensor with n as one of its sizes, or a list of n. Nothing is decided about a
    batch that has none but tensors of several first sizes, for it may be packed.

    Raises:
        ConfigError: All tensors have the same other number of rows.
    """
    if isinstance(batch, _PLAIN) and batch and isinstance(batch[0], Tensor) and rows in batch[0].shape:
        return  # what batches mostly are
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
            f"a micro-batch has {firsts.pop()} rows where the plan has {rows}; does task.collate add or drop some?"
        )


def leaves_of(batch: Any) -> Iterator[Tensor | int]:
    """Yield all tensors in nested tuples, lists, dicts and dataclasses, and before each list its length."""
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
    """Return the same nesting of tuples, lists, dicts and dataclasses with everything in it changed."""
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
