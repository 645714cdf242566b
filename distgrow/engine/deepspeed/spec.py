"""DeepSpeed: its settings; importing this loads neither torch nor deepspeed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.spec import PosFloat, PosInt
from distgrow.engine.ability import Can
from distgrow.engine.base import EngineSettings, Micro
from distgrow.optim import OptimizerSpec

if TYPE_CHECKING:
    from torch import nn

    from distgrow.engine.batches import Loss
    from distgrow.engine.deepspeed.engine import DeepSpeedEngine


class DeepSpeed(EngineSettings):
    """DeepSpeed's engine: ZeRO shards optimizer state (1), also gradients (2), also parameters (3)."""

    needs_group: ClassVar[bool] = True
    undelayed: ClassVar[str] = "keeps its gradients to itself"
    prunes_with: ClassVar[str] = "zero=1, precision=float32 and without offloading"
    delay: ClassVar[int] = 0
    ahead: ClassVar[int] = 0
    kind: Literal["deepspeed"] = "deepspeed"
    zero: Literal[1, 2, 3] = 1
    """ZeRO's stage. 2 and 3 reduce every micro-batch, so accumulation multiplies communication there."""
    max_micro: Micro = 64
    """Rows of a micro-batch, at most; a batch that needs more is accumulated. auto: what memory proves to hold."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16, float16: such parameters beside float32 masters; float16 with a dynamic loss scale."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of the local rank where there is one."""
    fused: bool = False
    """AdamW by DeepSpeed's own kernel, built at first use, in place of torch's."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory."""
    offload_parameters: bool = False
    """Keep sharded parameters in the host's memory; ZeRO 3 alone."""
    loss_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    """float16: the loss scale starts at 2 to this power; updates that overflow halve it and are skipped."""
    loss_scale_window: PosInt = 1000
    """float16: updates without overflow after which the loss scale doubles."""
    bucket_mb: PosFloat = 25.0
    """Size of a bucket of gradients that is reduced together, MiB."""

    @property
    def can(self) -> Can:
        """Return what it can do beside training."""
        prunes = self.zero == 1 and self.precision == "float32" and not self.offload_optimizer
        return Can.REPEAT | Can.MEASURE_NOISE | Can.TEST_PROGRESS | (Can.PRUNE if prunes else Can(0))

    @model_validator(mode="after")
    def _memory_can_be_tried(self) -> "DeepSpeed":
        if self.zero == 3 and self.max_micro == "auto":
            raise ConfigError(
                "max_micro=auto cannot be measured with zero=3, whose ranks cannot go on once one is out of memory; "
                "give max_micro a number, or use zero=1 or 2"
            )
        return self

    @model_validator(mode="after")
    def _parameters_are_sharded(self) -> "DeepSpeed":
        if self.offload_parameters and self.zero != 3:
            raise ConfigError(f"offload_parameters needs zero=3, which shards them; zero={self.zero} does not")
        return self

    def check_optimizer(self, optimizer: OptimizerSpec) -> None:
        """Check that it can make the optimizer's steps.

        Raises:
            ConfigError: It cannot: ZeRO's flat shards cut parameters anywhere, and `fused` has AdamW's kernel alone.
        """
        if not optimizer.joins_flat and (fault := optimizer.sharded_fault()):
            raise ConfigError(
                f"optimizer.kind={optimizer.name} {fault}, which engine.zero={self.zero} cuts into flat shards: its "
                "steps would be other ones; use engine.kind=torch, or optimizer.kind sgd, adamw or muon"
            )
        if self.fused and optimizer.fused_adamw() is None:
            raise ConfigError(
                f"engine.fused=true has no kernel for optimizer.kind={optimizer.name}; use adamw or fused=false"
            )

    def resizes(self, optimizer: OptimizerSpec) -> bool:
        """Return whether a checkpoint goes on with another number of ranks, by DeepSpeed's universal format."""
        return optimizer.adam_moments

    def remarks(self, micros: Sequence[int], accum: int) -> list[str]:
        """See EngineSettings."""
        if self.zero == 1 or accum == 1:
            return []
        return [f"ZeRO {self.zero} reduces every micro-batch: up to {accum} reductions an update; zero=1 needs one"]

    def make(
        self, model: "nn.Module", loss: "Loss", extrapolate: Extrapolate | None, **parts: Any
    ) -> "DeepSpeedEngine":
        """See EngineSettings. ConfigError if DeepSpeed is not installed."""
        try:
            from distgrow.engine.deepspeed.engine import DeepSpeedEngine
        except ImportError as error:
            raise ConfigError(
                f"engine.kind=deepspeed needs the extra 'deepspeed': pip install 'distgrow[deepspeed]' ({error})"
            ) from None
        return DeepSpeedEngine(model, loss, spec=self, **parts)
