"""Async: the settings of asynchronous workers, and what goes with them; importing this loads no torch and no ray."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.pace import Seconds
from distgrow.core.spec import PosInt
from distgrow.engine.ability import Can
from distgrow.engine.base import EngineSettings
from distgrow.growth.base import GrowthPolicy, Measure
from distgrow.optim import OptimizerSpec

if TYPE_CHECKING:
    from torch import nn

    from distgrow.engine.asynchronous.engine import AsyncEngine
    from distgrow.engine.asynchronous.workers import Start
    from distgrow.engine.batches import Loss

_SCHEDULES = "a schedule such as growth.kind exponential, linear or steps"


class Async(EngineSettings):
    """Asynchronous workers on Ray: each computes gradients of whole batches; one process applies them as they come."""

    delay: ClassVar[int] = 0  #: none that is fixed
    undelayed: ClassVar[str] = "applies gradients as they come"
    ahead: ClassVar[int] = 0
    can: ClassVar[Can] = Can.RESIZE_AVERAGE
    kind: Literal["async"] = "async"
    workers: PosInt = 2
    """Workers, τ_C: as many gradients are computed at a time. One of them alone is plain training."""
    adaptive: bool = True
    """A gradient that is more than τ_C updates old is applied at η·τ_C/τ, not at η."""
    drop_after: PosInt | None = None
    """A gradient that is more than so many updates old is not applied, and its samples count as discarded. At least
    `workers`. Default: none is dropped."""
    wait_s: Seconds = 120.0
    """Seconds to wait for all workers at the start; then the run goes on with those that there are. After as many
    seconds without any, it ends with a checkpoint and an error."""
    resources: dict[str, float] = {}
    """Ray's resources of each worker. Default: one CPU, and one GPU if device is cuda."""
    max_micro: PosInt = 64
    """Rows of a micro-batch, at most; a batch that needs more is accumulated by its worker."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: autocast with float32 parameters."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of the workers and of the process that applies. auto: the GPU if there is one."""

    @model_validator(mode="before")
    @classmethod
    def _memory_is_not_tried(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("max_micro") == "auto":
            raise ConfigError(
                "max_micro=auto tries out the memory of this process, and engine.kind=async computes in others: give "
                "max_micro a number"
            )
        return values

    @model_validator(mode="after")
    def _some_are_in_time(self) -> "Async":
        if self.drop_after is not None and self.drop_after < self.workers:
            raise ConfigError(
                f"drop_after={self.drop_after} is below workers={self.workers}: gradients that are computed at a time "
                f"are as late as that, so most would be dropped; give at least {self.workers}"
            )
        return self

    @model_validator(mode="after")
    def _resources_are_rays(self) -> "Async":
        for name, amount in self.resources.items():
            if amount < 0 or name in ("", "memory", "object_store_memory"):
                raise ConfigError(
                    f"resources={self.resources}: {name!r} cannot be {amount:g}: give resources such as CPU, GPU or "
                    "the cluster's own, each 0 or more; memory is none of them"
                )
        return self

    def factor(self, delay: int) -> float:
        """Return what the learning rate of a gradient is multiplied by that is `delay` updates old; 0: it is dropped.

        Source: after Koloskova, Stich & Jaggi 2022, arXiv 2206.08307, whose η is at most 1/(4Lτ) beyond τ_C.
        """
        if delay <= self.workers:
            return 1.0
        if self.drop_after is not None and delay > self.drop_after:
            return 0.0
        return self.workers / delay if self.adaptive else 1.0

    @property
    def actors(self) -> int:
        """See EngineSettings."""
        return self.workers

    def check_optimizer(self, optimizer: OptimizerSpec) -> None:
        """See EngineSettings: gradients come in any order."""
        if optimizer.goes_by_parts:
            raise ConfigError(
                f"optimizer.kind={optimizer.name} goes by the micro-batches of the present gradient, and "
                "engine.kind=async applies earlier ones: use optimizer.kind lars or lamb, or engine.kind=torch"
            )
        if optimizer.at_growth.changes:
            raise ConfigError(
                "optimizer.at_growth counts updates in the order of their batches, and engine.kind=async applies them "
                "in the order in which they come: leave optimizer.at_growth out, or use engine.kind=torch"
            )

    def check_growth(self, growth: GrowthPolicy) -> None:
        """See EngineSettings: growth may not go by what updates measure."""
        if growth.needs - {Measure.NORM}:
            raise ConfigError(
                f"growth.kind={growth.name} goes by what updates measure, and engine.kind=async applies gradients of "
                f"earlier parameters in no fixed order: use {_SCHEDULES}, or engine.kind=torch"
            )

    def lateness(self, batch: int) -> list[str]:
        """See EngineSettings."""
        late = self.workers - 1
        return [
            f"engine.workers={self.workers}: gradients are {counted(late, 'update')} late on average, so a batch b "
            f"counts as {self.workers}·b against the critical batch, up to {self.workers * batch:,}; no two runs are "
            "equal"
        ]

    def make(self, model: "nn.Module", loss: "Loss", extrapolate: Extrapolate | None, **parts: Any) -> "AsyncEngine":
        """See EngineSettings. Its workers start with the first update. ConfigError if Ray is not installed."""
        from distgrow.engine.asynchronous.engine import AsyncEngine

        self.check_workers(parts["world"].size)
        return AsyncEngine(model, loss, spec=self, start=self.start(), **parts)

    def start(self) -> "Start":
        """Return what starts the workers. Raise ConfigError if Ray is not installed."""
        try:
            from distgrow.engine.asynchronous.ray_workers import RayWorkers
        except ImportError as error:
            raise ConfigError(
                f"engine.kind=async needs the extra 'ray': pip install 'distgrow[ray]' ({error})"
            ) from None
        return RayWorkers

    def check_workers(self, workers: object) -> None:
        """See EngineSettings: one rank applies the gradients."""
        if workers != 1:
            raise ConfigError(
                f"engine.kind=async has one rank, which applies what its workers compute, and there are to be "
                f"{workers} (launch.workers, or torchrun's): use one, and give the number of workers as engine.workers"
            )
