"""Which modules are units, and what is done to a unit before it is cut into shards; knows no engine."""

from collections import Counter
from collections.abc import Sequence
from functools import wraps
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from distgrow.core.errors import ConfigError
from distgrow.engine.objective import compile_in_place

#: Containers that no forward pass calls.
_UNCALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def units_of(model: nn.Module, wrap: str | Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return the modules that are units, by name, in the model's order.

    Args:
        model: The model.
        wrap: Names of classes, or `auto` for the block that the model repeats; a model without one has no units.

    Raises:
        ConfigError: No module is of a class, or one cannot be a unit.
    """
    classes = _repeated(model) if isinstance(wrap, str) else set(wrap)
    found = [(name, part) for name, part in model.named_modules() if name and type(part).__name__ in classes]
    if not isinstance(wrap, str):
        _check_found(model, wrap, {type(part).__name__ for _, part in found})
    units = [(name, part) for name, part in found if any(True for _ in part.parameters())]
    for name, part in units:
        if isinstance(part, _UNCALLED):
            raise ConfigError(
                f"engine.wrap={list(wrap)}: {name} is a {type(part).__name__}, which no forward calls, so its "
                "parameters would never be gathered: name the class of the modules in it"
            )
    _check_apart(model, units)
    return units


def _check_found(model: nn.Module, wrap: Sequence[str], found: set[str]) -> None:
    missing = [name for name in wrap if name not in found]
    if missing:
        known = Counter(type(part).__name__ for name, part in model.named_modules() if name)
        shown = ", ".join(f"{name} ({count})" for name, count in known.most_common(12))
        raise ConfigError(
            f"engine.wrap={list(wrap)}: the model has no module of class {', '.join(missing)}; it has "
            f"{shown or 'none'}: name some of these, or use wrap=auto"
        )


def _repeated(model: nn.Module) -> set[str]:
    """Return the class of the siblings that hold most of the parameters, of those that have parts of their own."""
    sizes: Counter[str] = Counter()
    for parent in model.modules():
        counts = Counter(type(child).__name__ for child in parent.children())
        for child in parent.children():
            if counts[type(child).__name__] > 1 and any(True for _ in child.children()):
                sizes[type(child).__name__] += sum(p.numel() for p in child.parameters())
    sizes = +sizes
    return {sizes.most_common(1)[0][0]} - {kind.__name__ for kind in _UNCALLED} if sizes else set()


def _check_apart(model: nn.Module, units: Sequence[tuple[str, nn.Module]]) -> None:
    """Check that no unit shares a parameter with what is outside of it."""
    for name, unit in units:
        inside = {id(part) for part in unit.modules()}
        own = {id(p): key for key, p in unit.named_parameters()}
        for other, part in model.named_modules():
            shared = [own[id(p)] for p in part.parameters(recurse=False) if id(p) in own and id(part) not in inside]
            if shared:
                raise ConfigError(
                    f"engine.wrap: {name}.{shared[0]} is a parameter of {other or 'the model'} too, and a unit gathers "
                    f"its parameters alone: name classes without {type(unit).__name__} in engine.wrap, so that both "
                    "are gathered with the whole model"
                )


def chosen(units: Sequence[tuple[str, nn.Module]], which: str) -> list[nn.Module]:
    """Return the units whose activations are computed again: `none`, `all`, or every `second`."""
    parts = [unit for _, unit in units]
    return {"none": [], "all": parts, "second": parts[1::2]}[which]


def checkpoint_in_place(unit: nn.Module) -> None:
    """Compute a unit's activations again in backward in place of keeping them."""
    forward = unit.forward

    @wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    unit.forward = again


def compile_units(units: Sequence[tuple[str, nn.Module]], model: nn.Module) -> None:
    """Compile each unit, or the model if it has none."""
    for unit in [unit for _, unit in units] or [model]:
        compile_in_place(unit)


class Undo:
    """Remember modules as they are, to take back hooks, classes and attributes that are given to them later."""

    def __init__(self, root: nn.Module) -> None:
        self._kept = [(part, type(part), dict(vars(part)), _hooks(part)) for part in root.modules()]

    def __call__(self) -> None:
        """Take back all but the values of parameters, buffers and plain attributes that were there before."""
        for part, kind, attributes, hooks in self._kept:
            part.__class__ = kind
            for name in [name for name in vars(part) if name not in attributes]:
                del part.__dict__[name]
            for name in ("forward", "_compiled_call_impl"):
                if name in attributes:
                    part.__dict__[name] = attributes[name]
            for name, before in hooks.items():
                now = getattr(part, name)
                for key in [key for key in now if key not in before]:
                    del now[key]


def _hooks(part: nn.Module) -> dict[str, set[int]]:
    """Return the keys of a module's hooks, by the dictionary that holds them."""
    return {name: set(value) for name, value in vars(part).items() if name.endswith(("_hooks", "_hooks_with_kwargs"))}
