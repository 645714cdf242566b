"""Parameter groups of a torch optimizer, whoever made it."""

from collections.abc import Iterable
from typing import Any


def assign_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of all parameter groups, times a group's own `lr_scale`."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
