"""Task: model, loss and data, as training takes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Hold what is trained, on what. The function of `task.target` returns this, or (model, loss, train[, test])."""

    model: "nn.Module"
    loss: "Callable[[nn.Module, Any], Tensor]"  #: (model, collated batch) → mean over its rows, or over `items`
    train: Any  #: map-style data set
    test: Any = None  #: map-style data set, or none
    probe: Any = None  #: map-style data set of exact probes, where `train` augments; default: train
    #: (model, collated batch) → each metric's mean over rows, or its (sum, count); default: the loss
    metrics: "Callable[[nn.Module, Any], Mapping[str, Any]] | None" = None
    collate: Callable[[list[Any]], Any] | None = None  #: rows → batch; default: torch's
    items: Callable[[Any], Any] | None = None  #: collated batch → what its loss is a mean over; default: its rows
    #: tokens of every sample, or collated batch → its tokens; default: its items
    tokens: "int | Callable[[Any], Any] | None" = None
