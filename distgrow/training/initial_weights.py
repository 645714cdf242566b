"""Initial weights: reads those that a new run begins with, and puts them into its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.checkpoint.export import FILE, weights_of
from distgrow.checkpoint.storage import Store
from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.engine.state import read
from distgrow.training.init import Init

#: Names that a message lists, at most.
SHOWN = 8
TORCH = (".pt", ".pth", ".bin")


def begin_with(init: Init | None, model: nn.Module, own: Path, store: Store, world: World) -> list[str]:
    """Load the weights of `init`, if the run has no checkpoint yet. Collective: every rank must call.

    Args:
        init: Where the weights are. None: the model keeps its own.
        model: The run's model, not yet in an engine.
        own: The run's folder.
        store: The run's checkpoints.
        world: The ranks.

    Returns:
        Lines that say what was taken and what was left out.

    Raises:
        ConfigError: See `load`; or the weights are those of the run itself.
    """
    if init is None:
        return []
    world.on_rank0(lambda: init.check(own))
    if world.on_rank0(lambda: bool(store.names())):
        return []
    return world.on_all_ranks(lambda: load(init, model))


def load(init: Init, model: nn.Module) -> list[str]:
    """Load weights into a model, and return lines that say what was taken; executes no code from files.

    Raises:
        ConfigError: There are none, they are damaged, or they are of another model.
    """
    state, where = _state(init)
    own = model.state_dict()
    fitting = {name: state[name] for name in own if name in state and _shape(own[name]) == _shape(state[name])}
    faults = _faults(own, state, fitting)
    if faults and init.strict:
        raise ConfigError(
            f"init.from={where} is of another model: {'; '.join(faults)}; give weights of this model, or "
            "init.strict=false for those that fit"
        )
    if not fitting:
        raise ConfigError(f"init.from={where} has no weight of a name and shape of the model; leave out init")
    model.load_state_dict(fitting, strict=False)
    taken = f"begins with {len(fitting)} of {len(own)} tensors from {where}"
    return [taken, *(f"left out: {fault}" for fault in faults)]


def _faults(own: Mapping[str, Any], state: Mapping[str, Any], fitting: Mapping[str, Any]) -> list[str]:
    """Return what does not fit, a sentence for each kind. Files may hold tensors that share their memory once."""
    places = {own[name].data_ptr() for name in fitting if isinstance(own[name], Tensor)}
    lacking = [name for name in own if name not in state]
    lacking = [name for name in lacking if not isinstance(own[name], Tensor) or own[name].data_ptr() not in places]
    wrong = [
        f"{name} is {_shape(state[name])} there and {_shape(own[name])} in the model"
        for name in own
        if name in state and name not in fitting
    ]
    beyond = [name for name in state if name not in own]
    return [
        *_listed("of another shape", wrong),
        *_listed("not there", lacking),
        *_listed("not in the model", beyond),
    ]


def _state(init: Init) -> tuple[Mapping[str, Any], Path | str]:
    """Return the state of a model, on the CPU, and the checkpoint or file that it is of."""
    if init.uri is not None:
        weights = weights_of(init.uri, best=init.best, average=init.average, step=init.step)
        return weights.state, weights.place
    path = init.path
    if not path.exists():
        raise ConfigError(f"init.from={path} does not exist; give a run's folder, NAME.safetensors or NAME.pt")
    if path.is_dir() and ((path / "config.yaml").is_file() or not (path / FILE).is_file()):
        weights = weights_of(path, best=init.best, average=init.average, step=init.step)
        return weights.state, weights.checkpoint
    if init.best or init.average or init.step is not None:
        raise ConfigError(f"init.from={path} is a file, and best, average and step are of a run; leave them out")
    file = path / FILE if path.is_dir() else path
    return _read(file), file


def _read(file: Path) -> Mapping[str, Any]:
    """Return the state that a file of weights holds. ConfigError if it holds none, or is damaged."""
    if file.suffix != ".safetensors" and file.suffix not in TORCH:
        raise ConfigError(f"init.from={file}: allowed are a run's folder, NAME.safetensors and NAME.pt")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = read(file, torch.device("cpu"))
    except Exception as error:  # each reader has errors of its own for a file that is none of its kind
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise ConfigError(f"init.from={file} cannot be read: {reason}; write it anew, or give another") from None
    if not isinstance(state, Mapping):
        raise ConfigError(f"init.from={file} holds a {type(state).__name__}; write model.state_dict() alone")
    if not any(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(map(str, list(state)[:5]))
        raise ConfigError(f"init.from={file} holds no tensors but {keys or 'nothing'}; write model.state_dict() alone")
    return state


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _listed(what: str, names: Sequence[str]) -> list[str]:
    """Return a sentence of the names, if there are any."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"] if names else []
