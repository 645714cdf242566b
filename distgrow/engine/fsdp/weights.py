"""Weights out of an FSDP checkpoint, tensor by tensor from the shards of all ranks. Needs no ranks and no GPU."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from distgrow.core.errors import RunError
from distgrow.engine.deepspeed.shard_files import restricted
from distgrow.engine.fsdp import HEAD
from distgrow.engine.fsdp.files import Reader


class Weights(Mapping[str, Any]):
    """Show a model's state in a checkpoint. A tensor is read from the disk each time that it is asked for."""

    def __init__(self, folder: Path, *, average: bool = False) -> None:
        """Read what there is; executes no code from the files.

        Args:
            folder: The checkpoint.
            average: Show averages in place of what was averaged. Nothing is shown if there are none.

        Raises:
            RunError: The files hold more than data, or do not fit together.
        """
        self._folder, self._reader = folder, Reader(folder)
        head = restricted(folder / HEAD, ())
        try:
            rest = {**head["rest"], **(head["average"] if average else {})}
            names = {name: name for name in self._reader.tensors if name.startswith(("model.", "loss."))}
            names |= {alias: names[name] for alias, name in head["tied"].items()}
            there = bool(head["averaged"]) or not average
        except (LookupError, TypeError, AttributeError) as error:
            raise RunError(
                f"{folder / HEAD} does not fit the shards ({type(error).__name__}: {error}); restore the folder from a "
                "copy, or take another checkpoint"
            ) from None
        if average:
            known = self._reader.tensors
            names = {name: f"average.{key}" if f"average.{key}" in known else key for name, key in names.items()}
        self._keys = _model(names) if there else {}
        self._rest = _model(rest) if there else {}

    def __getitem__(self, name: str) -> Any:
        if name in self._rest:
            return self._rest[name]
        known = self._reader.tensors[self._keys[name]]
        tensor = torch.empty(known.size, dtype=known.properties.dtype)
        try:
            self._reader.into({self._keys[name]: tensor}, alone=True)
        except Exception as error:  # whatever DCP meets in a file that is none
            raise RunError(f"{self._folder} cannot be read: {error}; restore the folder from a copy") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter((*self._keys, *self._rest))

    def __len__(self) -> int:
        return len(self._keys) + len(self._rest)

    def kind(self, name: str) -> tuple[torch.dtype, torch.Size] | None:
        """Return precision and shape of a tensor, which is not read for it; None: it is not among the shards."""
        if name not in self._keys:
            return None
        known = self._reader.tensors[self._keys[name]]
        return known.properties.dtype, known.size


def _model(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is the model's, by its own names."""
    return {name.removeprefix("model."): value for name, value in named.items() if name.startswith("model.")}
