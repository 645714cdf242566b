"""State of modules and optimizers as bytes that can be read back without executing code; knows no engine."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgrow.core.errors import ConfigError


def serialised(state: Any) -> bytes:
    """Return what torch.save would write to a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def written(state: Any, owner: str = "model, loss or optimizer") -> bytes:
    """Return a state as bytes that `read` can read.

    Raises:
        ConfigError: It holds more than tensors and plain values.
    """
    advice = "let get_extra_state and state_dict return tensors and plain Python values"
    try:
        data = serialised(state)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(f"the state of {owner} cannot be written: {error}; {advice}") from error
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)):
        raise ConfigError(
            f"the state of {owner} holds {', '.join(sorted(unsafe)[:3])}, which cannot be read back "
            f"without executing code: {advice}"
        )
    return data


def read(file: Path, device: torch.device) -> Any:
    """Read a state onto a device; executes no code from the file."""
    return torch.load(file, map_location=device, weights_only=True)


def load_module(module: object, state: Mapping[str, Any] | None) -> None:
    """Load a module's state; a loss that is no module, or has no state, needs none.

    Raises:
        ValueError: There is none, and it needs one.
    """
    if not isinstance(module, nn.Module):
        return
    if state is None and module.state_dict():
        raise ValueError("it holds no state of the loss, which has parameters or buffers now")
    module.load_state_dict(state or {})
