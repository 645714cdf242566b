"""What an engine is, and the specs of engines and optimizers; importing this loads no torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, model_validator

from distgrow.plan import Plan
from distgrow.progress import Outcome
from distgrow.spec import ConfigError, PosFloat, PosInt, Spec


class Engine(Protocol):
    """All that computes: parameters, gradients, optimizer state."""

    evaluations: int
    """Per-sample gradient evaluations that this rank has really made, counted from the data."""

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """Accumulate, reduce, clip, step; a non-finite gradient is not applied. Collective: every rank must call.

        `votes` are this rank's wishes; the outcome tells which of them any rank had.
        """
        ...

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Means over all rows of all ranks' batches, in eval mode. Collective: every rank must call."""
        ...

    def save(self, folder: Path) -> None:
        """Write parameters, buffers and optimizer state into an existing folder. One rank calls."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; executes no code from the files. Every rank calls."""
        ...


class Torch(Spec):
    """Plain torch in one process, DistributedDataParallel in several."""

    kind: Literal["torch"] = "torch"
    max_micro: PosInt = 64
    """Rows of a micro-batch, at most; a batch that needs more is accumulated."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: autocast with float32 parameters."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of the local rank where there is one."""
    compile: bool = False
    """torch.compile the model; a micro-batch that grows is compiled again, so hold it fixed by a low max_micro."""
    bucket_mb: PosFloat = 25.0
    """Size of DDP's gradient buckets, MiB."""


EngineSpec = Torch


class SGD(Spec):
    """torch.optim.SGD."""

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum; 0 is plain SGD, the paper's optimizer."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty."""
    clip: PosFloat | None = None
    """Largest norm of the mean gradient; none: no clipping."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGD":
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov=true needs momentum above 0")
        return self


class AdamW(Spec):
    """torch.optim.AdamW."""

    kind: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    eps: PosFloat = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    clip: PosFloat | None = None
    """Largest norm of the mean gradient; none: no clipping."""


def _sgd_by_default(given: Any) -> Any:
    return {"kind": "sgd", **given} if isinstance(given, dict) else given


Optimizer = Annotated[SGD | AdamW, Field(discriminator="kind"), BeforeValidator(_sgd_by_default)]
