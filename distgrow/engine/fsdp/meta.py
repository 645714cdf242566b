"""Models on the meta device: their parameters are made unit by unit, where they train; knows no engine.

Every module draws from generators of its own, so the parameters do not depend on ranks, units or devices' number.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.order import mix_int


class Maker:
    """Make the parameters and buffers of modules that are on the meta device."""

    def __init__(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Take the model.

        Args:
            model: The model. Its `_init_weights`, if it has one, is called with every module, as Hugging Face's models
                do it.
            device: Where parameters are made.
            seed: Of all generators.
        """
        self._init: Callable[[nn.Module], Any] | None = getattr(model, "_init_weights", None)
        self._device, self._seed = device, seed
        self._numbers = {id(part): k for k, part in enumerate(model.modules())}
        self._names = {id(part): name for name, part in model.named_modules()}
        self._made: dict[int, nn.Parameter] = {}  # ties stay tied

    @torch.no_grad()
    def make(self, unit: nn.Module) -> None:
        """Make all parameters and buffers of a unit that it has not yet; parts before what holds them.

        Raises:
            ConfigError: Nothing says how some of them begin.
        """
        devices = [self._device] if self._device.type == "cuda" else []
        for part in reversed(list(unit.modules())):
            names = self._emptied(part)
            if not names:
                continue
            with torch.random.fork_rng(devices):
                torch.manual_seed(mix_int(self._seed, self._numbers.get(id(part), 0)))
                self._begin(part)
            for name in names:
                value = getattr(part, name)
                if value.is_floating_point() and value.isnan().any():
                    raise self._fault(part, name)

    def _begin(self, part: nn.Module) -> None:
        reset: Any = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
        if self._init is not None:
            self._init(part)

    def _emptied(self, part: nn.Module) -> list[str]:
        """Give a module's own tensors memory, with NaN in it, and return their names."""
        names: list[str] = []
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in self._made:
                    self._made[id(parameter)] = nn.Parameter(self._empty(parameter), parameter.requires_grad)
                part._parameters[name] = self._made[id(parameter)]
                names.append(name)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                self._check_buffer(part, name, buffer)
                part._buffers[name] = self._empty(buffer)
                names.append(name)
        return names

    def _check_buffer(self, part: nn.Module, name: str, buffer: Tensor) -> None:
        """Check that a buffer of whole numbers, which has no NaN, will begin by reset_parameters."""
        if not buffer.is_floating_point() and not hasattr(part, "reset_parameters"):
            raise self._fault(part, name)

    def _fault(self, part: nn.Module, name: str) -> ConfigError:
        where = ".".join(filter(None, (self._names.get(id(part), ""), name)))
        return ConfigError(
            f"{where} of {type(part).__name__} is on the meta device, and nothing says how it begins: give its class "
            "reset_parameters(), or the model _init_weights(module), or build the model on a real device"
        )

    def _empty(self, tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device=self._device)
        return made.fill_(torch.nan) if made.is_floating_point() else made.zero_()
