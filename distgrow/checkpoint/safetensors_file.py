"""A safetensors file, written tensor by tensor: the format of https://github.com/huggingface/safetensors."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgrow.core.errors import ConfigError

#: What the format calls a precision.
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
}  # fmt: skip
#: Tells a tensor's precision and shape before it is read; None: it has to be looked at.
Kind = Callable[[str], tuple[torch.dtype, torch.Size] | None]


def write(state: Mapping[str, Any], file: Path, kind: Kind | None = None) -> None:
    """Write tensors to a file, one after the other; ones that share memory get their own copy each.

    Args:
        state: The tensors by name. Each is asked for when its turn comes.
        file: The file.
        kind: Tells what a tensor is without reading it. None: each is read twice.

    Raises:
        ConfigError: There is something else than tensors, or a precision that the format does not know.
    """
    kinds = {name: (kind and kind(name)) or _kind(name, state[name]) for name in state}
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))  # so that numbers lie at whole places
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        dtype, shape = kinds[name]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little"))
        stream.write(head)
        for name in order:
            tensor = state[name].detach().cpu().contiguous().reshape(-1)
            if tensor.numel():
                stream.write(tensor.view(torch.uint8).numpy().data)


def _kind(name: str, value: Any) -> tuple[torch.dtype, torch.Size]:
    if not isinstance(value, Tensor):
        raise ConfigError(f"safetensors hold tensors alone, and {name} of the model's state is none; write NAME.pt")
    if value.dtype not in _NAMES:
        raise ConfigError(f"safetensors know no {value.dtype}, which {name} of the model's state has; write NAME.pt")
    return value.dtype, value.shape
