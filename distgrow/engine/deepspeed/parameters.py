"""What ZeRO makes of a model's parameters: flat shards, their masks, and what it leaves; knows no engine of ours."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.engine.masks import Masks

#: What ZeRO 3 leaves in modules, beside names that begin with ds_.
_ZERO_3 = (
    "_original_parameters",
    "_external_params",
    "pre_bwd_fn",  # classes within functions, which pickle cannot save
    "post_bwd_fn",
    "applied_pre_backward_ref_cnt",
    "all_parameters",
)
#: What DeepSpeed's optimizers call a rank's float32 shards: ZeRO 3, ZeRO 1 and 2, ZeRO 1 in bfloat16.
_MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def masters(optimizer: Any) -> list[Tensor]:
    """Return this rank's float32 shards of a ZeRO optimizer."""
    return list(next(getattr(optimizer, name) for name in _MASTERS if hasattr(optimizer, name)))


def prune_shards(engine: Any, masks: Masks, rank: int) -> list[Tensor]:
    """Set to 0 what this rank keeps of pruned weights under ZeRO 1, and return the masks of its shards."""
    state, kept = engine.basic_optimizer.state, masks_of_shards(engine.optimizer, masks, rank)
    for shard, mask in zip(masters(engine.optimizer), kept, strict=True):
        for tensor in (shard, *state.get(shard, {}).values()):
            if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                tensor.data.mul_(mask)
    return kept


def masks_of_shards(optimizer: Any, masks: Masks, rank: int) -> list[Tensor]:
    """Return the masks of this rank's shards under ZeRO 1.

    They are laid out in ZeRO's own buffers, which get their values back.
    """
    kept: list[Tensor] = []
    for number, group in enumerate(optimizer.bit16_groups):
        flat = optimizer.bit16_groups_flat[number].data
        weights = flat.clone()
        flat.fill_(1)
        for parameter in group:
            if (mask := masks.of(parameter)) is not None:
                parameter.data.copy_(mask)
        kept.append(optimizer.parallel_partitioned_bit16_groups[number][rank].detach().float().clone())
        flat.copy_(weights)
    return kept


def refuse_complex(parameters: Iterable[nn.Parameter]) -> None:
    """Check that no parameter is complex.

    Raises:
        ConfigError: One is: ZeRO's flat shards hold real numbers.
    """
    if any(parameter.is_complex() for parameter in parameters):
        raise ConfigError(
            "the model has complex parameters, which engine.kind=deepspeed cannot shard; use engine.kind=torch, or "
            "hold them as pairs of real numbers (torch.view_as_real)"
        )


def give_back(module: nn.Module, whole: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Put new parameters, with the values in `whole`, in the place of ZeRO 3's; ties stay tied."""
    new = {old: nn.Parameter(value, requires_grad=old.requires_grad) for old, value in whole.items()}
    for part in module.modules() if new else ():
        parameters = {name: old if old is None else new[old] for name, old in part._parameters.items()}
        for name in [name for name in vars(part) if name.startswith("ds_") or name in _ZERO_3]:
            delattr(part, name)
        part._parameters = parameters
