"""Collated batches of any nesting, and what every engine does with them; knows no engine."""

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.plan import Plan
from distgrow.distributed.world import World

Loss = Callable[[nn.Module, Any], Tensor]
Metrics = Callable[[nn.Module, Any], dict[str, Tensor]]

#: What batches mostly are; asking whether they are a Sequence takes many times longer.
_PLAIN = (tuple, list)


class WeightedLoss(nn.Module):
    """Model and loss as one module, so that a loss may call the model as it likes wherever the module is wrapped."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any, weight: float) -> Tensor:
        """The batch's mean loss times `weight`; without a batch, `weight` through all that has a gradient."""
        if batch is None:
            return torch.stack([weight * p.sum() for p in self.parameters() if p.requires_grad]).sum()
        return checked_loss(self.loss(self.model, batch)) * weight


def checked_loss(loss: Any) -> Tensor:
    """The loss, if it is one number that gradients can be had of; ConfigError where it is not."""
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
    """TrainingFailed with a way out where memory does not hold what is done here, and nothing smaller can be tried."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise TrainingFailed(f"memory does not hold {what}; {remedy}") from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the host's memory did not hold what was asked for."""
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


def serialised(state: Any) -> bytes:
    """What torch.save would write to a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def place(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The batch on a device, its floating-point tensors as `dtype` where one is given."""
    if device.type == "cpu" and dtype is None:
        return batch

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype=dtype if tensor.is_floating_point() else None, non_blocking=True)

    return map_tensors(move, batch)


def checked_rows(batch: Any, plan: Plan) -> int:
    """Rows of a micro-batch; ConfigError where they are not as many as the plan gave it."""
    rows, least = count_rows(batch), plan.batch // plan.world // plan.accum
    if not least <= rows <= plan.micro:
        wanted = f"{plan.micro}" if least == plan.micro else f"{least} to {plan.micro}"
        raise ConfigError(
            f"a micro-batch has {rows} rows where the plan has {wanted}; does task.collate add or drop some?"
        )
    return rows


def means(
    metrics: Callable[[Any], dict[str, Tensor]], batches: Iterable[tuple[Any, int]], world: World
) -> dict[str, float]:
    """Means over the rows that count of all ranks' (batch, rows that count). Collective: every rank must call."""
    sums: dict[str, float] = {}
    seen = 0
    for batch, rows in batches:
        seen += rows
        for name, mean in metrics(batch).items():
            if isinstance(mean, Tensor) and mean.numel() != 1:
                raise ConfigError(
                    f"the metric {name!r} has shape {tuple(mean.shape)}; it must be one number, a mean over rows"
                )
            sums[name] = sums.get(name, 0.0) + (float(mean) * rows if rows else 0.0)
    names = sorted(sums)
    *totals, rows = world.sum([*(sums[name] for name in names), seen])
    return {name: value / rows for name, value in zip(names, totals, strict=True)}


def count_rows(batch: Any) -> int:
    """Rows of a collated batch: the length of its first tensor."""
    first = next(tensors_of(batch), None)
    if first is None or first.dim() == 0:
        raise ConfigError(f"a batch of type {type(batch).__name__} holds no tensor with a row dimension")
    return first.shape[0]


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, _PLAIN) or (isinstance(batch, Sequence) and not isinstance(batch, str | bytes)):
        for value in batch:
            yield from tensors_of(value)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)


def map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same nesting with every tensor changed; named tuples stay named tuples."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)
        for key, value in batch.items():
            changed[key] = map_tensors(change, value)
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(change, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(change, value) for value in batch)
    return batch
