"""State: what a checkpoint of shards holds, and how it comes back on any number of ranks; knows no engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distgrow.core.errors import ConfigError, RunError
from distgrow.distributed.world import World
from distgrow.engine.averages import WeightAverage
from distgrow.engine.fsdp import HEAD
from distgrow.engine.fsdp.files import Reader, write
from distgrow.engine.fsdp.shards import Shards
from distgrow.engine.state import read, written


class State:
    """Write and read parameters, optimizer state and averages by parameters' names."""

    def __init__(self, root: nn.Module, optimizer: Any, shards: Shards) -> None:
        self._root, self._optimizer, self._shards = root, optimizer, shards
        self._aliases = {name for name, _ in root.named_parameters(remove_duplicate=False)}

    def snapshot(self, average: WeightAverage | None, *, first: bool) -> dict[str, bytes]:
        """Return the files that this rank keeps; the `first` keeps all that is no shard. Collective."""
        shards = self._shards
        tensors: dict[str, Tensor] = dict(shards.cut)
        state, cut = self._optimizer_state()
        tensors |= {f"optimizer.{key}.{name}": v for (name, key), v in cut.items()}
        means = average.state() if average is not None else {}
        tensors |= {f"average.{name}": shards.spread(name, v) for name, v in means.items() if name in shards.cut}
        files = write(tensors)
        if not first:
            return files
        head = {
            "rest": {name: v for name, v in self._root.state_dict().items() if name not in self._aliases},
            "tied": self._tied(),
            "state": state,
            "cut": [list(pair) for pair in cut],
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups],
            "average": {name: value for name, value in means.items() if name not in shards.cut},
            "averaged": bool(means),
        }
        return {**files, HEAD: written(head)}

    def _tied(self) -> dict[str, str]:
        """Return the names that are other names of a parameter, with its first."""
        first = {id(p): name for name, p in self._root.named_parameters()}
        every = self._root.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in every if first[id(p)] != name}

    def _optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], DTensor]]:
        """Return the optimizer's state by parameter: what is the same on all ranks, and what is cut as it is."""
        whole: dict[str, dict[str, Any]] = {}
        cut: dict[tuple[str, str], DTensor] = {}
        for name, shard in self._shards.local.items():
            state = self._optimizer.state.get(shard) or {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shard.shape:
                    cut[name, key] = self._shards.spread(name, value)
                else:
                    whole.setdefault(name, {})[key] = value
        return whole, cut

    def load(self, folder: Path, average: Callable[[], WeightAverage], world: World) -> None:
        """Take over what the ranks of a run have written. Collective: every rank must call.

        Raises:
            ConfigError: It is of another model.
            RunError: Another engine has written it, or it cannot be read without executing code.
        """
        if not (folder / HEAD).is_file():
            raise RunError(
                f"{folder} was not written by engine.kind=fsdp; go on with the engine that wrote it, or begin a new "
                "run from its weights: init=RUN"
            )
        head, reader = read(folder / HEAD, world.device), Reader(folder)
        self._check(folder, reader)
        shards = self._shards
        cut: dict[str, Tensor] = dict(shards.cut)
        state: dict[tuple[str, str], Tensor] = {}
        for name, key in head["cut"]:
            dtype = reader.tensors[f"optimizer.{key}.{name}"].properties.dtype
            state[name, key] = torch.zeros_like(shards.local[name], dtype=dtype, requires_grad=False)
            cut[f"optimizer.{key}.{name}"] = shards.spread(name, state[name, key])
        means: dict[str, Tensor] = dict(head["average"])
        if head["averaged"]:
            trained = [name for name, shard in shards.local.items() if shard.requires_grad]
            means |= {name: torch.zeros_like(shards.local[name], requires_grad=False) for name in trained}
            cut |= {f"average.{name}": shards.spread(name, means[name]) for name in trained}
        with torch.no_grad():
            reader.into(cut)
        self._take(head, state)
        if head["averaged"]:
            average().load({name: means[name] for name in average().names})
        shards.rest()

    def _check(self, folder: Path, reader: Reader) -> None:
        before = {name: v.size for name, v in reader.tensors.items() if name.startswith(("model.", "loss."))}
        now = {name: p.shape for name, p in self._shards.cut.items()}
        if differing := sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n)):
            name = differing[0]
            raise ConfigError(
                f"{folder} was written with another model: {name} has shape {_shown(before.get(name))} there, "
                f"{_shown(now.get(name))} here; give the run back its own"
            )

    def _take(self, head: dict[str, Any], cut: dict[tuple[str, str], Tensor]) -> None:
        """Give the optimizer and the module what was read of them."""
        for name, shard in self._shards.local.items():
            own = {key: value for (of, key), value in cut.items() if of == name}
            if own or name in head["state"]:
                self._optimizer.state[shard].update({**own, **head["state"].get(name, {})})
        for group, saved in zip(self._optimizer.param_groups, head["groups"], strict=True):
            group.update(saved)
        self._root.load_state_dict(head["rest"], strict=False)


def _shown(shape: Any) -> str:
    return "none" if shape is None else str(tuple(shape))
