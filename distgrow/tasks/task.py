"""Task: model, loss and data, as training takes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distgrow.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Hold what is trained, on what. The function of `task.target` returns this, or (model, loss, train[, test])."""

    model: "nn.Module"
    loss: "Callable[[nn.Module, Any], Tensor]"  #: (model, collated batch) → mean over its rows, or over `items`
    train: Any  #: map-style data set
    test: Any = None  #: map-style data set, a dict of several by name, or none
    probe: Any = None  #: map-style data set of exact probes, where `train` augments; default: train
    #: (model, collated batch) → each metric's mean over rows, or its (sum, count); default: the loss
    metrics: "Callable[[nn.Module, Any], Mapping[str, Any]] | None" = None
    collate: Callable[[list[Any]], Any] | None = None  #: rows → batch; default: torch's
    items: Callable[[Any], Any] | None = None  #: collated batch → what its loss is a mean over; default: its rows
    #: tokens of every sample, or collated batch → its tokens; default: its items
    tokens: "int | Callable[[Any], Any] | None" = None
    flops_per_token: float | None = None  #: of a training step, without what is computed again; for the share of a GPU
    #: model → what it makes, such as a text, for RUN/samples.jsonl at the end of the run
    sample: "Callable[[nn.Module], Any] | None" = None


def test_sets(test: Any, key: str = "test") -> dict[str, Any]:
    """Return the test sets by their names: none, one without a name (""), or those of a dict.

    A dict whose keys are no texts is a data set itself, as its rows may have these numbers.

    Raises:
        ConfigError: A dict is empty, or a name cannot be one.
    """
    if test is None:
        return {}
    if not isinstance(test, dict) or (test and not any(isinstance(name, str) for name in test)):
        return {"": test}
    if not test:
        raise ConfigError(f"{key}={{}} names no test set; leave it out, or give one: {{'clean': data}}")
    for name in test:
        if not isinstance(name, str) or not name or "/" in name or name == "average":
            raise ConfigError(
                f"{key}: {name!r} cannot be the name of a test set: give texts without /, but not 'average'; they come "
                "before the metrics, as in clean/loss"
            )
    return dict(test)
