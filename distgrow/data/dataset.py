"""What a data set must offer: rows by number, and optionally whole batches at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset, WeightedRandomSampler

from distgrow.core.endless import ENDLESS
from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, Order, UInt64s
from distgrow.data.seeding import seed_generators


class Batched(ABC):
    """A data set that makes a whole collated batch at once, which is faster than row by row.

    A class says so by deriving from this one: that it happens to have a method `batch` means nothing.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def batch(self, indices: Int64s, seeds: UInt64s) -> Any:
        """Return the collated rows `indices`, which may repeat.

        Args:
            indices: Numbers of rows, (rows,).
            seeds: A 64-bit seed for each of them, (rows,). Anything random about a row must follow from its seed
                alone: runs would otherwise depend on the number of ranks and on the micro-batch.
        """


class Gathered(ABC):
    """A data set that reads several rows at once, which is faster than one by one, and leaves collation to others."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def rows(self, indices: Int64s, seeds: UInt64s) -> list[Any]:
        """Return the rows `indices`, which may repeat. For the arguments see Batched.batch."""

    def collated(self, indices: Int64s, seeds: UInt64s, collate: Callable[[list[Any]], Any]) -> Any:
        """Return the collated rows."""
        return collate(self.rows(indices, seeds))

    def __getitem__(self, index: int) -> Any:
        """Return one row."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.rows(np.array([index % len(self)]), np.array([index % len(self)], np.uint64))[0]


class Ordered(ABC):
    """A data set that sets the order of its rows itself, such as one whose rows lie in files."""

    @abstractmethod
    def order(self, seed: int) -> Callable[[Any], tuple[Int64s, Int64s]]:
        """Return the map from positions of the endless sample stream to (epochs, indices), as Order is one."""

    def facts(self) -> dict[str, int]:
        """Return numbers that the data of a resumed run must share, as the order follows from them."""
        return {}


def rows_of(dataset: Any, indices: Int64s, seeds: UInt64s) -> list[Any]:
    """Return rows of a map-style data set, each read after the generators were seeded with its own seed."""
    if isinstance(dataset, Gathered):
        return dataset.rows(indices, seeds)
    rows: list[Any] = []
    for index, seed in zip(indices.tolist(), seeds.tolist(), strict=True):
        seed_generators(seed)
        rows.append(dataset[index])
    return rows


def order_of(dataset: Any, seed: int) -> Callable[[Any], tuple[Int64s, Int64s]]:
    """Return the order in which a data set's rows are drawn: its own, or Order."""
    return dataset.order(seed) if isinstance(dataset, Ordered) else Order(n=len(dataset), seed=seed)


def facts_of(dataset: Any) -> dict[str, int]:
    """Return what the data set of a resumed run must share."""
    return dataset.facts() if isinstance(dataset, Ordered) else {}


class Tensors(Batched):
    """Torch's TensorDataset. No row of it is random, so a batch takes rows of each tensor at once."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._tensors = dataset.tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def batch(self, indices: Int64s, seeds: UInt64s) -> list[Tensor]:
        """Return what default_collate makes of the rows."""
        rows = torch.from_numpy(indices)
        # as tensor[rows], which takes up to five times as long if a row is one piece of memory
        return [tensor.index_select(0, rows.to(tensor.device)) for tensor in self._tensors]


def batched(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> Batched | None:
    """Return the data set as one that makes whole batches, or None if rows have to be collated one by one."""
    if collate is None and type(dataset) is TensorDataset:
        return Tensors(dataset)
    return dataset if isinstance(dataset, Batched) else None


def is_stream(dataset: Any) -> bool:
    """Return whether a data set can only be read from its beginning, as often as one likes."""
    if isinstance(dataset, IterableDataset):
        return True
    no_stream = isinstance(dataset, DataLoader | Sampler | Batched | Gathered | dict | str | bytes | set | frozenset)
    again = hasattr(dataset, "__iter__") and not hasattr(dataset, "__next__")
    return again and not hasattr(dataset, "__getitem__") and not no_stream


def has_length(dataset: Any) -> bool:
    """Return whether a data set knows how many rows it has."""
    try:
        return len(dataset) >= 0
    except (TypeError, NotImplementedError):
        return False


def size_of(dataset: Any) -> int:
    """Return the number of rows of an epoch; ENDLESS of a stream without a length."""
    return ENDLESS if is_stream(dataset) and not has_length(dataset) else len(dataset)


def check_training_set(dataset: Any, name: str) -> None:
    """Check that a training set gives its rows by number, or from their beginning as often as one likes.

    Raises:
        ConfigError: It does neither. The message gives its type and the way out.
    """
    if not is_stream(dataset):
        check_rows_by_number(dataset, name, " or an iterable one, whose __iter__ begins anew each time")


def check_rows_by_number(dataset: Any, name: str, instead: str = "") -> None:
    """Check that a data set gives its rows by number.

    Args:
        dataset: What a user has given.
        name: What messages call it.
        instead: What else is allowed.

    Raises:
        ConfigError: It does not. The message gives its type and the way out.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise ConfigError(
            f"{name} is a DataLoader, whose batches and order would not be the schedule's; give its data set and "
            f"collation: {name}=loader.dataset, collate=loader.collate_fn{_instead_of_weights(dataset.sampler)}"
        )
    if isinstance(dataset, Sampler):
        raise ConfigError(
            f"{name} is a {kind}, which draws numbers of rows, as the schedule does; give the data set"
            f"{_instead_of_weights(dataset)}"
        )
    has_rows = hasattr(dataset, "__getitem__") or isinstance(dataset, Batched)
    if not (has_rows and hasattr(dataset, "__len__")) or isinstance(dataset, IterableDataset | dict | str):
        raise ConfigError(
            f"{name} is {kind}, which has no rows by number: without them each sample once per epoch cannot be had; "
            f"give a map-style data set, with __len__ and __getitem__{instead}"
        )


def _instead_of_weights(sampler: Any) -> str:
    """Return what to do about a sampler with weights."""
    if not isinstance(sampler, WeightedRandomSampler):
        return ""
    return (
        ". Its weights: have the data set list a row as often as it is to be drawn in an epoch, or multiply each "
        "row's loss by its weight before the mean over rows"
    )
