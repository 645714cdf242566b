"""Sparse experts in place of a transformer's MLP, and the loss that keeps their load even; knows no task."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


class Active:
    """Hold how many experts a token uses now, for all layers of a model.

    Copies of the model share it: a copy for exact probes follows the model that trains.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def __deepcopy__(self, memo: Any) -> "Active":
        return self


class Experts(nn.Module):
    """Map (rows, length, width) to the same shape by the k of T experts whose logits are largest, for each token.

    The weights are a softmax over the k largest logits, taken after the choice. Equal logits go to the expert with the
    smaller number, so that every rank routes alike.

    Every expert computes, some of them on no token: then its gradient is exactly 0, but there is one, which DDP and
    DeepSpeed wait for.
    """

    def __init__(
        self,
        width: int,
        make: Callable[[], nn.Module],
        *,
        count: int,
        active: Active,
        capacity: float | None = None,
        coefficient: float = 0.0,
    ) -> None:
        """Make the experts and their router.

        Args:
            width: Size of a token.
            make: Makes an expert.
            count: T, experts.
            active: k, of all layers.
            capacity: Tokens of a row that an expert takes, at most, as a multiple of the even share; None: all.
            coefficient: The factor of this layer's balance in the loss.
        """
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(count))
        self.active, self.capacity, self.coefficient = active, capacity, coefficient
        self.penalties: list[Tensor] | None = None  #: where the balance of each row goes, if the loss asks for it

    def forward(self, x: Tensor) -> Tensor:
        """Return Σ p_e·E_e(x) over the chosen experts e of each token."""
        logits = self._logits(x)
        weights, chosen = choice(logits, self.active.experts)
        if self.penalties is not None:
            self.penalties.append(self.coefficient * balance(logits, chosen))
        kept = chosen if self.capacity is None else self._within_capacity(chosen)
        flat, weights, kept = x.flatten(0, 1), weights.flatten(0, 1), kept.flatten(0, 1)
        mixed = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens = kept[:, number].nonzero().squeeze(1)
            part = weights[tokens, number].unsqueeze(1) * expert(flat[tokens])
            mixed.index_add_(0, tokens, part.to(mixed.dtype))
        return mixed.view_as(x)

    def _logits(self, x: Tensor) -> Tensor:
        """Return the router's logits, in single precision at least: in half precision many of them would be equal."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.router.weight
            dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
            return nn.functional.linear(x.to(dtype), weight.to(dtype))

    def _within_capacity(self, chosen: Tensor) -> Tensor:
        """Return the choices that experts have room for: in each row those of its first tokens.

        So a token's output depends neither on later tokens nor on other rows.
        """
        assert self.capacity is not None
        room = most_tokens(chosen.shape[1], chosen.shape[2], self.active.experts, self.capacity)
        return chosen & (chosen.cumsum(1) <= room)


def choice(logits: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Return (weights, chosen), both (…, T): the softmax over the `active` largest logits, 0 elsewhere; and which."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    first = order[..., :active]
    weights = torch.zeros_like(logits).scatter(-1, first, values[..., :active].softmax(-1))
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, first, True)
    return weights, chosen


def balance(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return T·Σ_e f_e·p̄_e of each row, (rows,), from (rows, length, T).

    f_e is the share of the row's choices that went to e, p̄_e its mean probability under a softmax over all T logits.
    It is 1 if the load is even or all experts are active, and T if one expert alone has all tokens and all probability.
    """
    shares = chosen.to(logits.dtype).mean(1) / chosen[:, :1].sum(-1)
    return logits.shape[-1] * (shares * logits.softmax(-1).mean(1)).sum(-1)


def most_tokens(length: int, experts: int, active: int, capacity: float) -> int:
    """Return ⌈capacity·k·length/T⌉, the tokens of a row that an expert takes at most."""
    return -int(-capacity * active * length // experts)


def with_balance(model: nn.Module, loss: Loss, items: Callable[[Any], Tensor] | None = None) -> Loss:
    """Return a loss plus each row's balance, summed over the model's layers of experts; without such, the loss itself.

    It is a mean over rows if the loss is one, or over items, each of which has the balance of its row. So it does not
    depend on how a batch is split into ranks and micro-batches, as the balance of a whole micro-batch would.

    Args:
        model: The model that will be trained.
        loss: The loss of the task.
        items: A collated batch → the items of each row, (rows,), if the loss is a mean over these.
    """
    if not any(isinstance(module, Experts) for module in model.modules()):
        return loss

    def balanced(model: nn.Module, batch: Any) -> Tensor:
        with _penalties(model) as found:
            value = loss(model, batch)
        rows = torch.stack(found).sum(0)
        if items is None:
            return value + rows.mean().to(value.dtype)
        counts = items(batch).to(rows.dtype)
        return value + ((rows * counts).sum() / counts.sum()).to(value.dtype)

    return balanced


@contextmanager
def _penalties(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that each layer of experts adds the balance of its rows to, inside the context."""
    found: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    for layer in layers:
        layer.penalties = found
    try:
        yield found
    finally:
        for layer in layers:
            layer.penalties = None
