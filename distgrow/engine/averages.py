"""WeightAverage: an average of a model's parameters and buffers, kept beside them; knows no engine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """Keep the average ā of tensors θ. `Plan.average` says how much the θ after an update weighs.

    Tensors of a sharded engine are this rank's shards: ZeRO cuts the average as it cuts the parameters.
    Integer tensors are not averaged: inside `swapped` they are the present ones.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin an average of `tensors` by name, which must stay the same objects."""
        averaged = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() or t.is_complex()}
        self._names, self._now = list(averaged), list(averaged.values())
        self._mean = [tensor.clone() for tensor in self._now]
        self.begun = False

    @torch.no_grad()
    def update(self, weight: float, unless: Tensor | None = None) -> None:
        """Take in the tensors as they are now: ā ← ā + weight·(θ − ā). A weight of 0 changes nothing.

        Args:
            weight: That of θ.
            unless: One truth value on the device. If it is true, nothing changes.
        """
        if weight == 0:
            return
        self.begun = True
        if unless is not None:
            for mean, now in zip(self._mean, self._now, strict=True):
                mean.lerp_(now, (~unless).to(mean.dtype) * weight)
            return
        torch._foreach_lerp_(self._mean, self._now, weight)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the tensors the values of their average inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for now, mean in zip(self._now, self._mean, strict=True):
            kept = now.clone()
            now.copy_(mean)
            mean.copy_(kept)

    @torch.no_grad()
    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Set to 0 what is 0 in the masks, which are given by the tensors' names."""
        for name, mean in zip(self._names, self._mean, strict=True):
            if name in masks:
                mean.mul_(masks[name])

    @property
    def names(self) -> list[str]:
        """Return the tensors' names."""
        return list(self._names)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by the tensors' names; empty if no update was taken in yet."""
        return dict(zip(self._names, self._mean, strict=True)) if self.begun else {}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: It is of other tensors.
        """
        shapes = {name: mean.shape for name, mean in zip(self._names, self._mean, strict=True)}
        if state and {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError("it holds the average of other tensors")
        self.begun = bool(state)
        for name, mean in zip(self._names if state else (), self._mean, strict=self.begun):
            mean.copy_(state[name])
