"""Parameter groups of an optimizer of the user's own: checked, shown, and as config.yaml records them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distgrow.core.errors import ConfigError
from distgrow.optim.groups import Group, Grouped

if TYPE_CHECKING:
    import torch
    from torch import nn

#: What a config can hold beside lists.
PLAIN = bool | int | float | str | None
#: What a group holds beside its settings; `lr_scale` says of its learning rate what a run goes by.
_NO_SETTINGS = frozenset({"params", "lr", "initial_lr"})


def recorded(optimizer: "torch.optim.Optimizer") -> dict[str, Any]:
    """Return the settings of an optimizer, and of each group its size and those that differ, as plain values."""
    settings = _plain(optimizer.defaults)
    groups: dict[str, Any] = {}
    for k, group in enumerate(optimizer.param_groups):
        own = {name: value for name, value in _plain(group).items() if name not in _NO_SETTINGS}
        differing = {name: value for name, value in own.items() if name not in settings or settings[name] != value}
        groups[str(k)] = {"parameters": len(group["params"]), **differing}
    return {**settings, "groups": groups}


def without_rate(optimizer: Any) -> Any:
    """Return the values that config.yaml holds of an optimizer, without the learning rate, which `lr` holds as well."""
    if not isinstance(optimizer, dict) or not isinstance(settings := optimizer.get("settings"), dict):
        return optimizer
    return {**optimizer, "settings": {key: value for key, value in settings.items() if key != "lr"}}


def shown(optimizer: "torch.optim.Optimizer", named: "Mapping[str, nn.Parameter]") -> list[str]:
    """Return a line for each group of an optimizer's parameters, or of several optimizers'; none if there is one."""
    if len(optimizer.param_groups) < 2:
        return []
    names = {id(parameter): name for name, parameter in named.items()}
    lines: list[str] = []
    for one in getattr(optimizer, "optimizers", [optimizer]):
        for k, group in enumerate(one.param_groups):
            own = {name: float(group[name]) for name in ("lr_scale", "weight_decay") if name in group}
            parameters = list(group["params"])
            label = f"{type(one).__name__}, group {k}"
            found = [names.get(id(parameter), "") for parameter in parameters]
            lines.append(Grouped(label=label, names=found, parameters=parameters, own=own).shown())
    return lines


def check_parameters(optimizer: "torch.optim.Optimizer", named: "Mapping[str, nn.Parameter]") -> None:
    """Check that an optimizer has every parameter that trains once, and no other.

    Raises:
        ConfigError: It has not; the message names the parameters.
    """
    known = {id(parameter): name for name, parameter in named.items()}
    has = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [tuple(p.shape) for p in has if id(p) not in known]
    if foreign:
        raise ConfigError(
            f"the optimizer has {len(foreign)} parameters, of shape {_listed([*map(str, foreign)], 3)}, that are "
            "neither the model's nor the loss's: build it over the parameters of the model that is trained"
        )
    ids = [id(p) for p in has]
    if len(ids) > len({*ids}):
        twice = [name for key, name in known.items() if ids.count(key) > 1]
        raise ConfigError(
            f"the optimizer has {_listed(twice)} more than once: each step would move them as often; give each "
            "parameter to one group"
        )
    missing = [name for name, p in named.items() if p.requires_grad and id(p) not in {*ids}]
    if missing:
        raise ConfigError(
            f"the optimizer has no group for {_listed(missing)}: they would not be trained; add them, or set "
            "requires_grad=False there"
        )


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _plain(values: Group | Mapping[str, Any]) -> dict[str, Any]:
    """Return those values that a config can hold; tuples such as `betas` as lists."""
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    parts = {name: value if isinstance(value, list) else [value] for name, value in lists.items()}
    return {name: lists[name] for name, found in parts.items() if all(isinstance(part, PLAIN) for part in found)}
