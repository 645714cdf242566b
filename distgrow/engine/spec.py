"""The specs of engines; importing this loads no torch."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.sparsity import Sparsity
from distgrow.core.spec import PosFloat, PosInt, Spec, default_kind
from distgrow.engine.ability import Can, check_skips
from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.protocol import Engine
from distgrow.optim import OptimizerSpec

if TYPE_CHECKING:
    from torch import nn

    from distgrow.distributed.world import World
    from distgrow.engine.batches import Loss, Metrics
    from distgrow.engine.items import Items, Tokens


def _rows_or_auto(given: Any) -> Any:
    if isinstance(given, str) and given != "auto":
        raise ConfigError(f"{given!r} must be a number of rows, or auto")
    return given


Micro = Annotated[PosInt | Literal["auto"], BeforeValidator(_rows_or_auto)]


def most_rows(max_micro: int | str, epoch: int) -> int:
    """Rows of a micro-batch, at most, before memory has been asked: `auto` sets no limit but the data set's size."""
    return epoch if isinstance(max_micro, str) else max_micro


NotNegative = Annotated[int, Field(ge=0)]


class Torch(Spec):
    """Plain torch in one process, DistributedDataParallel in several."""

    needs_group: ClassVar[bool] = False  #: whether one process alone must be a process group too
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
        """Check that it can make the optimizer's steps: with ahead=0 it can make all.

        Raises:
            ConfigError: It cannot.
        """
        check_skips(self.ahead, optimizer)

    def resizes(self, optimizer: OptimizerSpec) -> bool:
        """Return whether a checkpoint goes on with another number of ranks."""
        return True

    def build(
        self,
        model: "nn.Module",
        loss: "Loss",
        *,
        metrics: "Metrics | None",
        optimizer: OptimizerSpec,
        world: "World",
        items: "Items | None" = None,
        tokens: "Tokens | None" = None,
        extrapolate: Extrapolate | None = None,
        sparsity: Sparsity | None = None,
    ) -> Engine:
        """Build the engine on this rank. Collective: every rank must call."""
        from distgrow.engine.ahead import AheadEngine
        from distgrow.engine.extrapolated import ExtrapolatingEngine
        from distgrow.engine.overlapped import OverlappedEngine
        from distgrow.engine.torch import TorchEngine

        self.check_optimizer(optimizer)
        parts: dict[str, Any] = {"metrics": metrics, "optimizer": optimizer, "world": world, "items": items}
        if extrapolate is None:
            kinds = {0: TorchEngine, 1: OverlappedEngine if self.delay else AheadEngine}
            engine = kinds[self.ahead](model, loss, spec=self, **parts)
        else:
            engine = ExtrapolatingEngine(model, loss, extrapolate=extrapolate, spec=self, **parts)
        engine.tokens = items if tokens is None else tokens
        engine.prune_by(sparsity)
        return engine


class DeepSpeed(Spec):
    """DeepSpeed's engine: ZeRO shards optimizer state (1), also gradients (2), also parameters (3)."""

    needs_group: ClassVar[bool] = True
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
        return Can.TEST_PROGRESS | Can.PRUNE if prunes else Can.TEST_PROGRESS

    @model_validator(mode="before")
    @classmethod
    def _applies_at_once(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("delay"):
            raise ConfigError(
                f"delay={values['delay']} is unknown to engine.kind=deepspeed, which keeps its gradients to itself: "
                "use engine.kind=torch, or leave delay out"
            )
        return values

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

    def build(
        self,
        model: "nn.Module",
        loss: "Loss",
        *,
        metrics: "Metrics | None",
        optimizer: OptimizerSpec,
        world: "World",
        items: "Items | None" = None,
        tokens: "Tokens | None" = None,
        extrapolate: Extrapolate | None = None,
        sparsity: Sparsity | None = None,
    ) -> Engine:
        """Build the engine on this rank. Collective: every rank must call."""
        self.check_optimizer(optimizer)
        assert extrapolate is None, "check_extrapolation refuses it"
        try:
            from distgrow.engine.deepspeed.engine import DeepSpeedEngine
        except ImportError as error:
            raise ConfigError(
                f"engine.kind=deepspeed needs the extra 'deepspeed': pip install 'distgrow[deepspeed]' ({error})"
            ) from None
        engine = DeepSpeedEngine(model, loss, metrics=metrics, spec=self, optimizer=optimizer, world=world, items=items)
        engine.tokens = items if tokens is None else tokens
        engine.prune_by(sparsity)
        return engine


EngineSpec = Annotated[Torch | DeepSpeed | FSDP | Async, Field(discriminator="kind"), default_kind("torch")]
