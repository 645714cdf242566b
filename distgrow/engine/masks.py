"""Masks: which weights of a model's kernels are pruned, by magnitude over all kernels together; knows no engine."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distgrow.core.errors import ConfigError
from distgrow.core.sparsity import Sparsity
from distgrow.distributed.world import World
from distgrow.engine.batches import memory_for
from distgrow.engine.computed_weights import check_not_computed, computed_from

#: Modules whose parameters are no kernels, whatever their shape.
_OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
#: Bits of a magnitude that one pass over the weights tells apart.
_DIGIT = 16


class Masks:
    """Keep pruned weights at 0, and their gradients. A weight that is pruned once stays so.

    A gradient is masked as backward hands it over, before it is added up, averaged over ranks, measured or clipped.
    """

    def __init__(
        self, kernels: Mapping[str, nn.Parameter], world: World, pruned: "Callable[[Masks], None] | None" = None
    ) -> None:
        """Begin with dense kernels. Set hooks on them, before others that are to see masked gradients.

        Args:
            kernels: What is pruned, by name.
            world: The ranks.
            pruned: Called after a pruning, to set to 0 what is kept elsewhere of the pruned weights.
        """
        self.kernels, self._world, self._pruned, self.density = dict(kernels), world, pruned, 1.0
        self._size = sum(kernel.numel() for kernel in self.kernels.values())
        self._kept: list[Tensor] = []  # 1 where a weight is left, else 0, in the kernels' type; empty until pruned
        self._hooks: list[RemovableHandle] = [
            kernel.register_hook(partial(self._mask, number)) for number, kernel in enumerate(self.kernels.values())
        ]

    def _mask(self, number: int, gradient: Tensor) -> Tensor | None:
        return gradient * self._kept[number] if self._kept else None

    def follow(self, density: float) -> bool:
        """Prune to a share of weights left, and return whether that was to be done. Collective: every rank must call.

        All ranks take the masks of the first one, whose weights are equal.
        """
        if density >= self.density:
            return False
        weights = [kernel.detach() for kernel in self.kernels.values()]
        with memory_for("the masks of pruned weights", "leave out sparsity, or use a smaller model"):
            self._kept = largest(weights, self._kept, count_of(density, self._size))
        self._world.share(self._kept)
        self.density = density
        self.zero()
        if self._pruned is not None:
            self._pruned(self)
        return True

    @torch.no_grad()
    def zero(self) -> None:
        """Set pruned weights to 0."""
        if self._kept:
            torch._foreach_mul_(list(self.kernels.values()), self._kept)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def zero_beside(self, kept_of: Callable[[nn.Parameter], Iterable[object]]) -> None:
        """Set to 0 what belongs to pruned weights in other tensors, if these have the shape of their parameter.

        Args:
            kept_of: Returns what is kept beside a parameter, such as its optimizer state.
        """
        for kernel, kept in zip(self.kernels.values(), self._kept, strict=bool(self._kept)):
            for tensor in kept_of(kernel):
                if isinstance(tensor, Tensor) and tensor.shape == kernel.shape:
                    tensor.mul_(kept)

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's mask: 1 where a weight is left, else 0. None if nothing of it is pruned."""
        if not self._kept:
            return None
        return next((kept for k, kept in zip(self.kernels.values(), self._kept, strict=True) if k is parameter), None)

    def named(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the masks by the names that a module's parameters have there; empty until something is pruned."""
        found = {name: self.of(parameter) for name, parameter in module.named_parameters()}
        return {name: mask for name, mask in found.items() if mask is not None}

    def state(self) -> dict[str, Any]:
        """Return density and masks, a bit a weight, by the names of the kernels; empty until something is pruned."""
        if not self._kept:
            return {}
        bits = {name: _packed(kept) for name, kept in zip(self.kernels, self._kept, strict=True)}
        return {"density": self.density, "kept": bits}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: It is of other kernels.
        """
        if state and state["kept"].keys() != self.kernels.keys():
            raise ValueError("it holds masks of other kernels, such as with another sparsity.keep_dense")
        self.density = state["density"] if state else 1.0
        self._kept = [_unpacked(state["kept"][name], kernel) for name, kernel in self.kernels.items()] if state else []
        self.zero()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def masks_of(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    sparsity: Sparsity | None,
    world: World,
    pruned: Callable[[Masks], None],
) -> Masks | None:
    """Return the masks of a model that will be pruned; None if it stays dense. See `kernels_of` and `Masks`."""
    if sparsity is None or not sparsity.target:
        return None
    return Masks(kernels_of(model, named, sparsity), world, pruned)


def kernels_of(model: nn.Module, named: Mapping[str, nn.Parameter], sparsity: Sparsity) -> dict[str, nn.Parameter]:
    """Return what can be pruned, by name.

    These are the trained parameters of two dimensions or more of modules without parts, such as linear layers and
    convolutions, and of attention; neither embeddings, nor what is tied to one, nor norms, nor biases, which attention
    has of three dimensions.

    Args:
        model: The model.
        named: Its parameters by name.
        sparsity: It says which of them stay dense.

    Raises:
        ConfigError: Nothing can be pruned, nothing would be left, a name that stays dense meets nothing, or layers
            compute their weights from what would be pruned.
    """
    layers = [part for part in model.modules() if isinstance(part, nn.MultiheadAttention) or not any(part.children())]
    own = [(part, name, p) for part in layers for name, p in part.named_parameters(recurse=False)]
    inside = {id(p) for part, name, p in own if not isinstance(part, _OTHERS) and not name.startswith("bias")}
    inside -= {id(p) for part, _, p in own if isinstance(part, _OTHERS)}
    computed = {id(p) for part in model.modules() if not isinstance(part, _OTHERS) for p in computed_from(part)}
    inside |= computed
    found = {name: p for name, p in named.items() if id(p) in inside and p.dim() >= 2 and p.requires_grad}
    shown = ", ".join(list(found)[:12]) + (" …" if len(found) > 12 else "")
    for expression in sparsity.keep_dense:
        if not any(re.search(expression, name) for name in found):
            raise ConfigError(
                f"sparsity.keep_dense={expression!r} meets no kernel; "
                + (f"their names are {shown}" if found else "the model has none, so leave out sparsity")
            )
    dense = [name for name in found if any(re.search(expression, name) for expression in sparsity.keep_dense)]
    kernels = {name: parameter for name, parameter in found.items() if name not in dense}
    check_not_computed(name for name, parameter in kernels.items() if id(parameter) in computed)
    if not kernels:
        raise ConfigError(
            f"sparsity.target={sparsity.target:g} finds nothing to prune: "
            + (f"keep_dense meets all kernels, {shown}; shorten it" if found else _NO_KERNELS)
        )
    size = sum(kernel.numel() for kernel in kernels.values())
    if not count_of(1 - sparsity.target, size):
        raise ConfigError(
            f"sparsity.target={sparsity.target:g} leaves none of the {size} weights that can be pruned: lower it to "
            f"1 - 1/{size} or less"
        )
    return kernels


_NO_KERNELS = (
    "the model has no trained kernels of two dimensions or more in layers that are neither embeddings nor norms; leave "
    "out sparsity, or put weights into nn.Linear, nn.Conv2d or modules of their own"
)


def count_of(density: float, size: int) -> int:
    """Return ⌊density·size⌋, the weights that are left, forgiving float round-off."""
    return math.floor(density * size * (1 + 1e-12))


@torch.no_grad()
def largest(weights: Sequence[Tensor], kept: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return masks of the `count` largest magnitudes of all tensors together; of equal ones, the first.

    No sort and no copy of all weights is needed: floats of one sign are ordered as their bits are, which are told apart
    digit by digit.

    Args:
        weights: The tensors.
        kept: Masks of the weights to choose from, 1 or 0, of which there are `count` at least; none: all.
        count: How many are left.

    Returns:
        1 or 0 for every weight, in its tensor's shape and real type.
    """
    double = any(weight.dtype.to_real() == torch.float64 for weight in weights)
    bits = [_bits(weight, double=double) for weight in weights]
    for number, mask in enumerate(kept):
        bits[number] = torch.where(mask.bool(), bits[number], -1)
    least, ties = _threshold(bits, count, 64 if double else 32)
    masks: list[Tensor] = []
    for weight, each in zip(weights, bits, strict=True):
        equal = (each == least).flatten()
        first = equal & (equal.cumsum(0) <= ties)
        ties -= int(first.sum())
        masks.append(((each > least) | first.view_as(each)).to(weight.dtype.to_real()))
    return masks


def _bits(weight: Tensor, *, double: bool) -> Tensor:
    """Return magnitudes as whole numbers in the same order."""
    magnitude = weight.abs().to(torch.float64 if double else torch.float32)
    return magnitude.view(torch.int64 if double else torch.int32)


def _threshold(bits: Sequence[Tensor], count: int, width: int) -> tuple[int, int]:
    """Return the `count`-th largest number, and how many that equal it are among the `count` largest."""
    if count == 0:
        return 2 ** (width - 1) - 1, 0
    prefix, left = 0, count
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(2**_DIGIT, dtype=np.int64)
        for each in bits:
            high = each[(each >> shift >> _DIGIT) == prefix] if shift < width - _DIGIT else each[each >= 0]
            digits = (high >> shift) & (2**_DIGIT - 1)
            counts += torch.bincount(digits.flatten(), minlength=2**_DIGIT).cpu().numpy()
        above = np.cumsum(counts[::-1])[::-1]  # with this digit or a larger one
        digit = int(np.flatnonzero(above >= left)[-1])
        left -= int(above[digit] - counts[digit])
        prefix = prefix << _DIGIT | digit
    return prefix, left


def _packed(kept: Tensor) -> Tensor:
    """Return a mask as bits, eight in a byte."""
    return torch.from_numpy(np.packbits(kept.flatten().bool().cpu().numpy()))


def _unpacked(bits: Tensor, kernel: nn.Parameter) -> Tensor:
    """Return the mask of a kernel. The inverse of `_packed`. ValueError if it is of another shape."""
    if bits.numel() != -(-kernel.numel() // 8):
        raise ValueError("it holds a mask of another shape")
    flat = np.unpackbits(bits.cpu().numpy(), count=kernel.numel())
    return torch.from_numpy(flat).to(kernel.device, kernel.dtype.to_real()).view_as(kernel)
