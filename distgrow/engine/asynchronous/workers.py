"""Workers: what an asynchronous engine asks of those that compute its gradients; knows neither ray nor an engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from distgrow.core.plan import Plan
from distgrow.engine.batches import Loss
from distgrow.engine.gradients import Gradient
from distgrow.engine.items import Items
from distgrow.engine.spec import Torch

if TYPE_CHECKING:
    from distgrow.engine.asynchronous.spec import Async


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Hold what a worker is made of: the arguments of Gradients."""

    model: nn.Module
    loss: Loss
    items: Items | None
    clip: float | None
    spec: Torch


@dataclass(slots=True, kw_only=True)
class Job:
    """Hold a batch whose gradient is wanted."""

    plan: Plan
    batches: Any  #: its micro-batches, as `Workers.keep` has returned them
    tokens: int  #: counted in it
    version: int = 0  #: updates that were applied to the parameters it was last handed out with
    deaths: int = 0  #: workers that died over it


@dataclass(frozen=True, slots=True, kw_only=True)
class Came:
    """Hold that a gradient has come."""

    job: Job
    gradient: Gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """Hold that a worker has died over a job."""

    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """Hold that there has been no worker for `wait_s`."""

    why: str = ""  #: if that is known, after a colon


class Workers(Protocol):
    """Compute gradients elsewhere. Workers may die, and others take their places."""

    def keep(self, value: Any) -> Any:
        """Return what stands for a value that workers need. It holds a copy, so that the value may change."""
        ...

    def value(self, kept: Any) -> Any:
        """Return the value that `keep` was given."""
        ...

    def idle(self) -> bool:
        """Return whether a worker is there that has nothing to do."""
        ...

    def hand_out(self, job: Job, tensors: Any) -> None:
        """Let an idle worker compute the gradient of a job, at the kept `tensors` of Gradients."""
        ...

    def next(self, *, block: bool) -> Came | Died | Gone | None:
        """Return what has happened; None: nothing, or a worker has become idle.

        Args:
            block: Whether to wait until something happens.
        """
        ...

    def close(self) -> None:
        """End all workers."""
        ...


#: Starts workers, and waits for them as the spec says.
Start = Callable[[Parts, "Async"], Workers]
