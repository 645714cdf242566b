"""Beside: what a run keeps in its checkpoints beside the engine's state, such as the state of its hooks."""

from pathlib import Path
from typing import Any, Protocol

from distgrow.core.progress import Progress


class Beside(Protocol):
    """Keep state of a run beside the engine's."""

    @property
    def version(self) -> Any:
        """A value that changes with the state, where progress does not. It is equal on every rank."""
        ...

    def before_checkpoint(self, progress: Progress) -> dict[str, bytes]:
        """Return the files that rank 0 keeps in a checkpoint. Collective: every rank must call."""
        ...

    def load(self, folder: Path) -> None:
        """Take over the state in a checkpoint."""
        ...


class Nothing:
    """Keep nothing beside the engine's state."""

    version = 0

    def before_checkpoint(self, progress: Progress) -> dict[str, bytes]:
        """See Beside."""
        return {}

    def load(self, folder: Path) -> None:
        """See Beside."""
