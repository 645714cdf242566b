"""Weights out of a DeepSpeed checkpoint, put together from the shards of all ranks. Needs no deepspeed and no GPU."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgrow.core.errors import RunError
from distgrow.engine.deepspeed.shard_files import TAG, check, listed, restricted

_WHOLE, _PARTED = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")

#: A rank's shards: a flat tensor for each group of parameters.
Flat = Sequence[Tensor]


def weights(folder: Path, *, average: bool = False) -> dict[str, Any]:
    """Return a model's state out of the shards of a checkpoint, on the CPU.

    Parameters have the precision that the forward pass uses. The same holds for their average.

    Args:
        folder: The checkpoint.
        average: Return averages in place of what was averaged.

    Returns:
        The state by the model's own names. It is empty if an average is wanted and there is none.

    Raises:
        RunError: The folder holds more than data of shards, or they do not fit together.
    """
    ranks = check(folder)
    try:
        state = _averaged(folder, ranks) if average else _present(folder, ranks)
    except RunError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{folder / TAG}: the shards do not fit together ({type(error).__name__}: {error}); restore the folder "
            "from a copy, or take another checkpoint"
        ) from None
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def _present(folder: Path, ranks: int) -> dict[str, Any]:
    """Return the state of model and loss."""
    first, parted = _model(folder, ranks)
    if not parted:
        return dict(first["module"])
    flats = [_optimizer(folder, rank)["fp32_flat_groups"] for rank in range(ranks)]
    trained = _joined(flats, first["param_shapes"])
    return _in_place(first, {**trained, **_frozen(folder, ranks, first)})


def _averaged(folder: Path, ranks: int) -> dict[str, Any]:
    """Return the state of model and loss with averages in it; nothing if there are none."""
    first, parted = _model(folder, ranks)
    names = [f"average-{rank}.pt" for rank in range(ranks)]
    if not set(names) <= (listed(folder) or set()):
        return {}
    means = [restricted(folder / name) for name in names]
    if not means[0]:
        return {}
    flats = [[mean[f"shard {k}"] for k in range(len(first["param_shapes"]))] for mean in means]
    if parted:
        trained = _joined(flats, first["param_shapes"])
    else:
        gaps = _optimizer(folder, 0).get("param_alignment_paddings")
        trained = _cut([torch.cat(parts) for parts in zip(*flats, strict=True)], first["param_shapes"], gaps)
    buffers = {name: value for name, value in means[0].items() if name in first["buffer_names"]}
    frozen = _frozen(folder, ranks, first) if parted else {}
    return _in_place(first, {**trained, **frozen, **buffers})


def _model(folder: Path, ranks: int) -> tuple[dict[str, Any], bool]:
    """Return what rank 0 wrote of the module, and whether ZeRO 3 has cut the parameters in it."""
    parted = not (folder / TAG / _WHOLE).is_file()
    first = restricted(folder / TAG / (_PARTED.format(0) if parted else _WHOLE))
    if first["dp_world_size"] != ranks:
        raise RunError(
            f"{folder / TAG} holds the shards of {ranks} ranks, but {first['dp_world_size']} wrote it; restore the "
            "folder from a copy, or take another checkpoint"
        )
    return first, parted


def _optimizer(folder: Path, rank: int) -> dict[str, Any]:
    """Return what a rank wrote of its optimizer. Its tensors stay on the disk."""
    for file in (folder / TAG).iterdir():
        match = _OPTIM.fullmatch(file.name)
        if match is not None and int(match[1]) == rank:
            return restricted(file, mmap=True)["optimizer_state_dict"]
    raise RunError(f"{folder / TAG} lacks the shards of rank {rank}; restore the folder from a copy")


def _joined(flats: Sequence[Flat], groups: Sequence[Mapping[str, torch.Size]]) -> dict[str, Tensor]:
    """Join parameters that ZeRO 3 has cut one by one.

    Args:
        flats: The shards of each rank. A parameter of n numbers has ⌈n / ranks⌉ in each.
        groups: The shapes of the parameters of each group, in their order.
    """
    found: dict[str, Tensor] = {}
    for k, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            length = -(-shape.numel() // len(flats))
            parts = [flat[k].detach()[start : start + length] for flat in flats]
            found[name] = torch.cat(parts)[: shape.numel()].view(shape)
            start += length
    return found


def _cut(
    flats: Flat, groups: Sequence[Mapping[str, torch.Size]], gaps: Sequence[Sequence[int]] | None
) -> dict[str, Tensor]:
    """Cut parameters out of the whole flat tensors of ZeRO 1 and 2.

    Args:
        flats: The tensor of each group.
        groups: The shapes of the parameters of each group, in their order.
        gaps: Numbers without meaning after each parameter of each group. None: there are none.
    """
    found: dict[str, Tensor] = {}
    for k, shapes in enumerate(groups):
        start = 0
        for gap, (name, shape) in zip(gaps[k] if gaps else [0] * len(shapes), shapes.items(), strict=True):
            found[name] = flats[k][start : start + shape.numel()].view(shape)
            start += shape.numel() + gap
    return found


def _frozen(folder: Path, ranks: int, first: Mapping[str, Any]) -> dict[str, Tensor]:
    """Join the parameters that are not trained, which ZeRO 3 has cut too."""
    shapes: Mapping[str, torch.Size] = first.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    others = [restricted(folder / TAG / _PARTED.format(rank)) for rank in range(1, ranks)]
    parts = [part["frozen_param_fragments"] for part in (first, *others)]
    return {name: torch.cat([part[name] for part in parts])[: shape.numel()].view(shape)
            for name, shape in shapes.items()}  # fmt: skip


def _in_place(first: Mapping[str, Any], values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the module's state with these values in it, in its precision. Tied names share their value."""
    state = {name: values[name].to(value.dtype) if name in values else value for name, value in first["module"].items()}
    return {**state, **{name: state[other] for name, other in first["shared_params"].items() if name in state}}
