"""Parameters that a layer computes its weights from, such as those of weight_norm; knows no engine."""

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from distgrow.core.errors import ConfigError

#: Ends of the names of such parameters, where a hook computes the weights before each forward pass.
_ENDS = ("_g", "_v", "_orig")


def computed_from(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that a layer computes others of its tensors from."""
    if parametrize.is_parametrized(layer):
        assert isinstance(layer.parametrizations, nn.Module)
        yield from layer.parametrizations.parameters()
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
            name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
            own = dict(layer.named_parameters(recurse=False))
            yield from (own[name + end] for end in _ENDS if name + end in own)


def check_not_computed(names: Iterable[str]) -> None:
    """Check that no kernels are left that layers compute their weights from.

    Raises:
        ConfigError: There are; `names` are theirs.
    """
    if found := list(names):
        shown = ", ".join(found[:6]) + (" …" if len(found) > 6 else "")
        raise ConfigError(
            f"sparsity cannot prune {shown}: layers compute their weights from these (weight_norm, spectral_norm, "
            "parametrize, prune), so that the smallest of them are not the smallest weights; make the weights "
            "parameters again (remove_weight_norm, remove_parametrizations), or name these in sparsity.keep_dense"
        )
