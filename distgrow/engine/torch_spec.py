"""Plain torch: its settings; importing this loads no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.spec import PosFloat
from distgrow.engine.ability import Can, check_skips
from distgrow.engine.base import EngineSettings, Micro, compiles_anew
from distgrow.optim import OptimizerSpec

if TYPE_CHECKING:
    from torch import nn

    from distgrow.engine.batches import Loss
    from distgrow.engine.torch import TorchEngine

NotNegative = Annotated[int, Field(ge=0)]


class Torch(EngineSettings):
    """Plain torch in one process, DistributedDataParallel in several."""

    can: ClassVar[Can] = ~Can.CUT_MODEL  #: all else
    kind: Literal["torch"] = "torch"
    max_micro: Micro = 64
    """Rows of a micro-batch, at most; a batch that needs more is accumulated. auto: what memory proves to hold."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: autocast with float32 parameters."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of the local rank where there is one."""
    compile: bool = False
    """torch.compile the model; a micro-batch that grows is compiled again, so hold it fixed by a low max_micro."""
    find_unused: bool = False
    """Let several ranks go on when a parameter takes part in the loss of some updates only; a search at every update
    for those that do not. One process needs no search."""
    bucket_mb: PosFloat = 25.0
    """Size of DDP's gradient buckets, MiB."""
    delay: NotNegative = 0
    """τ, updates after which a gradient is applied: the parameters after update t have taken in gradients up to t − τ.
    0: at once."""

    ahead: Literal[0, 1] = 0
    """Updates that are begun before the host knows what the last one gave. 1: a GPU never waits for the host, decisions
    see what updates up to the last but one gave, and a step that is not finite is undone on the device. With delay=1
    several ranks average a gradient while they compute the next. 0: at once."""

    @model_validator(mode="after")
    def _one_in_flight(self) -> "Torch":
        if self.ahead and (self.delay > 1 or (self.delay and self.find_unused)):
            what = f"delay={self.delay}" if self.delay > 1 else "delay=1 and find_unused=true"
            raise ConfigError(f"ahead={self.ahead} does not go with {what}: set ahead=0, or delay=0")
        return self

    def check_optimizer(self, optimizer: OptimizerSpec) -> None:
        """See EngineSettings: with ahead=0 it can make all steps."""
        check_skips(self.ahead, optimizer)

    def remarks(self, micros: Sequence[int], accum: int) -> list[str]:
        """See EngineSettings."""
        return compiles_anew(micros) if self.compile else []

    def make(self, model: "nn.Module", loss: "Loss", extrapolate: Extrapolate | None, **parts: Any) -> "TorchEngine":
        """See EngineSettings."""
        from distgrow.engine.ahead import AheadEngine
        from distgrow.engine.extrapolated import ExtrapolatingEngine
        from distgrow.engine.overlapped import OverlappedEngine
        from distgrow.engine.torch import TorchEngine

        if extrapolate is not None:
            return ExtrapolatingEngine(model, loss, extrapolate=extrapolate, spec=self, **parts)
        kinds = {0: TorchEngine, 1: OverlappedEngine if self.delay else AheadEngine}
        return kinds[self.ahead](model, loss, spec=self, **parts)
