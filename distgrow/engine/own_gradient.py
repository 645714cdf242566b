"""OwnGradient: a rank's own gradient of an update, as it is before ranks average theirs; knows no engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from distgrow.engine.batches import memory_for
from distgrow.engine.clipping import clip_factor

_REMEDY = "set extrapolate.local=false, or use a smaller model"


class OwnGradient:
    """Add up the gradients of this rank's micro-batches, by hooks on the parameters.

    A hook on a leaf sees the gradient of one backward alone, before DDP adds and averages it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clip: float | None) -> None:
        """Begin with no update.

        Args:
            parameters: Those whose gradients are added up.
            clip: Largest norm of the mean gradient; None: no clipping.
        """
        self._parameters, self._clip = parameters, clip
        self._sums: list[Tensor | None] = []

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Forget the last update, and add up the gradients of every backward inside the context."""
        self._sums = [None] * len(self._parameters)
        hooks = [p.register_hook(partial(self._add, k)) for k, p in enumerate(self._parameters)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _add(self, number: int, gradient: Tensor) -> None:
        known = self._sums[number]
        with memory_for("a rank's own gradient", _REMEDY):
            self._sums[number] = gradient.clone() if known is None else known.add_(gradient)

    @torch.no_grad()
    def mean(self, weight: float) -> list[Tensor | None]:
        """Return the mean gradient of this rank's rows, or items, clipped by its own norm, and forget it.

        Args:
            weight: Sum of the weights that the losses of its micro-batches had. 0: there is no gradient.
        """
        sums, self._sums = self._sums, []
        given = [value for value in sums if value is not None]
        if not weight or not given:
            return [None] * len(self._parameters)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(given))).item() / weight  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(given, clip_factor(self._clip, norm) / weight)  # pyright: ignore[reportPrivateImportUsage]
        return sums
