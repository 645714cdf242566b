"""What a config names as package.module:name: found, and called with its arguments."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from distgrow.core.errors import ConfigError
from distgrow.tasks.raised import told_as


def named(key: str, target: str) -> Any:
    """Return the function or class that the value `target` of `key` names.

    Raises:
        ConfigError: There is none.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise ConfigError(f"{key}={target!r} must read package.module:function")
    with told_as(f"{key}={target!r}: {module} fails where it is imported:"):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, but one that it imports is not
            raise ConfigError(
                f"{key}={target!r} does not import: {error}; is it beside the config, in the "
                "working directory or on PYTHONPATH?"
            ) from error
    function = getattr(found, name, None)
    if not callable(function):
        raise ConfigError(f"{key}={target!r}: {module} has no function {name!r}")
    return function


def called(key: str, target: str, args: Mapping[str, Any]) -> Any:
    """Return what the function or class that `key` names makes of its arguments.

    Raises:
        ConfigError: There is none, the arguments do not fit it, or it raises.
    """
    function = named(key, target)
    try:
        inspect.signature(function).bind(**args)
    except (TypeError, ValueError) as error:
        told = key.rpartition(".")[0]
        raise ConfigError(f"{told}.args={dict(args)!r} do not fit {key}={target!r}: {error}") from None
    with told_as(f"{key}={target!r} raised"):
        return function(**args)
