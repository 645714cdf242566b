"""FSDP: the settings of torch's fully_shard, and what goes with them; importing this loads no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.spec import PosInt
from distgrow.engine.ability import Can, check_skips
from distgrow.engine.base import EngineSettings, Micro, compiles_anew
from distgrow.optim import OptimizerSpec

if TYPE_CHECKING:
    from torch import nn

    from distgrow.distributed.world import World
    from distgrow.engine.batches import Loss
    from distgrow.engine.fsdp.engine import FSDPEngine


class FSDP(EngineSettings):
    """torch's fully_shard (FSDP2): parameters, gradients and optimizer state are cut into shards, unit by unit."""

    needs_group: ClassVar[bool] = True
    undelayed: ClassVar[str] = "applies gradients at once"
    delay: ClassVar[int] = 0
    can: ClassVar[Can] = Can.REPEAT | Can.MEASURE_NOISE | Can.TEST_PROGRESS | Can.RESIZE_AVERAGE | Can.CUT_MODEL
    kind: Literal["fsdp"] = "fsdp"
    wrap: Literal["auto"] | list[str] = "auto"
    """Classes whose modules are units: a unit's parameters are gathered together. auto: the block that the model
    repeats. What is in no unit is gathered with the whole model."""
    shard: Literal["full", "grad_op", "hybrid"] = "full"
    """full: parameters are gathered anew for backward, and for each micro-batch. grad_op: they stay whole from the
    first forward of an update to its last backward. hybrid: as full within a host, with a replica on each host."""
    replicas: PosInt | None = None
    """hybrid: how many times the parameters are held, by equally many ranks each. Default: once a host."""
    reduce: Literal["last", "every"] = "last"
    """last: gradients are reduced once an update, and until then a rank holds whole ones. every: after each
    micro-batch, so that a rank holds its shard of them alone."""
    max_micro: Micro = 64
    """Rows of a micro-batch, at most; a batch that needs more is accumulated. auto: what memory proves to hold beside
    all parameters, which trials gather at once. shard=full and hybrid may hold more."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: gathered parameters and activations; shards, reductions and steps stay in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of the local rank where there is one."""
    offload: bool = False
    """Keep shards, their gradients and the optimizer's state in the host's memory; it needs a GPU."""
    checkpoint_blocks: Literal["none", "all", "second"] = "none"
    """Units whose activations are computed again in backward: none, all, or every second."""
    compile: bool = False
    """torch.compile each unit; a micro-batch that grows is compiled again, so hold it fixed by a low max_micro."""
    find_unused: bool = False
    """Let ranks go on when a parameter takes part in the loss of some micro-batches only: others send zeros for it."""
    ahead: Literal[0, 1] = 0
    """Updates that are begun before the host knows what the last one gave. 1: a GPU never waits for the host, decisions
    see what updates up to the last but one gave, and a step that is not finite is undone on the device. 0: at once."""

    @field_validator("wrap", mode="before")
    @classmethod
    def _is_a_list(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            raise ConfigError(f"wrap={value} must be auto or a list of class names: wrap=[{value}]")
        if isinstance(value, list) and not value:
            raise ConfigError("wrap=[] names no class: give some, such as wrap=[Block], or auto")
        return value

    @model_validator(mode="after")
    def _replicates_by_hybrid(self) -> "FSDP":
        if self.replicas is not None and self.shard != "hybrid":
            raise ConfigError(
                f"replicas={self.replicas} needs shard=hybrid, which holds the parameters several times; "
                f"shard={self.shard} holds them once"
            )
        return self

    @model_validator(mode="after")
    def _steps_on_the_device(self) -> "FSDP":
        if self.ahead and self.offload:
            raise ConfigError(
                f"ahead={self.ahead} does not go with offload=true, which steps in the host's memory and so waits for "
                "each gradient: set ahead=0, or offload=false"
            )
        return self

    def check_optimizer(self, optimizer: OptimizerSpec) -> None:
        """See EngineSettings: a rank's optimizer sees some rows of each parameter alone."""
        check_skips(self.ahead, optimizer)
        if not optimizer.joins and (fault := optimizer.sharded_fault()):
            raise ConfigError(
                f"optimizer.kind={optimizer.name} {fault}, of which engine.kind=fsdp gives each rank some rows: its "
                "steps would be other ones; use engine.kind=torch, or an optimizer.kind such as adamw, muon or lamb"
            )

    def check_ranks(self, ranks: int) -> None:
        """See EngineSettings: the replicas must divide them."""
        if self.replicas is not None and ranks % self.replicas:
            fitting = [n for n in range(1, ranks + 1) if ranks % n == 0]
            raise ConfigError(
                f"engine.replicas={self.replicas} does not divide the number of ranks, {ranks}: give one of "
                f"{', '.join(map(str, fitting))}, or other launch.workers"
            )

    def check_device(self, world: "World") -> None:
        """Check that there is a GPU if `offload` needs one. ConfigError if not."""
        if self.offload and world.device.type == "cpu":
            raise ConfigError("engine.offload=true keeps shards in the host's memory for a GPU, and there is none here")

    def check_cut(self, model: "nn.Module", world: "World") -> None:
        """See EngineSettings: there must be units and whole replicas, `offload` needs a GPU, and `auto` a new torch."""
        from distgrow.engine.fsdp.mesh import replicas_of
        from distgrow.engine.fsdp.shards import check_trials
        from distgrow.engine.fsdp.wrap import units_of

        self.check_device(world)
        if self.max_micro == "auto":
            check_trials()
        replicas_of(self, world)
        units_of(model, self.wrap)

    def remarks(self, micros: Sequence[int], accum: int) -> list[str]:
        """See EngineSettings."""
        found = compiles_anew(micros) if self.compile else []
        if self.reduce == "last" or accum == 1:
            return found
        every = f"reduce=every reduces each micro-batch: up to {accum} reductions an update; reduce=last needs one"
        return [every, *found]

    def make(self, model: "nn.Module", loss: "Loss", extrapolate: Extrapolate | None, **parts: Any) -> "FSDPEngine":
        """See EngineSettings."""
        from distgrow.engine.fsdp.ahead import AheadFSDPEngine
        from distgrow.engine.fsdp.engine import FSDPEngine

        kind = AheadFSDPEngine if self.ahead else FSDPEngine
        return kind(model, loss, spec=self, **parts)
