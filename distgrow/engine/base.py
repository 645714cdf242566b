"""EngineSettings: what every engine tells the rest of the package about itself; importing this loads no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.sparsity import Sparsity
from distgrow.core.spec import PosInt, Spec
from distgrow.growth.base import GrowthPolicy
from distgrow.optim import OptimizerSpec

if TYPE_CHECKING:
    from torch import nn

    from distgrow.distributed.world import World
    from distgrow.engine.batches import Loss, Metrics
    from distgrow.engine.items import Items, Tokens
    from distgrow.engine.protocol import Engine


def _rows_or_auto(given: Any) -> Any:
    if isinstance(given, str) and given != "auto":
        raise ConfigError(f"{given!r} must be a number of rows, or auto")
    return given


Micro = Annotated[PosInt | Literal["auto"], BeforeValidator(_rows_or_auto)]


class EngineSettings(Spec, ABC):
    """Hold an engine's settings. A subclass gives `kind`, `can` and `make`, and replaces the defaults that differ.

    It also gives `max_micro`, `precision`, `device`, `delay` and `ahead`, as keys or fixed. Other modules go by what an
    engine says, not by its type.
    """

    needs_group: ClassVar[bool] = False
    """Whether one process alone must be a process group too."""
    prunes_with: ClassVar[str] = ""
    """With which of its settings it can prune, if not with all."""
    undelayed: ClassVar[str] = ""
    """Why it has no `delay`, if it has none: what it does in place of that."""

    @model_validator(mode="before")
    @classmethod
    def _knows_no_delay(cls, values: Any) -> Any:
        if cls.undelayed and isinstance(values, dict) and values.get("delay"):
            raise ConfigError(
                f"delay={values['delay']} is unknown to engine.kind={cls.model_fields['kind'].default}, which "
                f"{cls.undelayed}: use engine.kind=torch, or leave delay out"
            )
        return values

    @property
    def actors(self) -> int:
        """Return how many actors it starts on Ray, beside the workers of `launch`."""
        return 0

    def check_optimizer(self, optimizer: OptimizerSpec) -> None:
        """Check that it can make the optimizer's steps. ConfigError if not."""

    def check_growth(self, growth: GrowthPolicy) -> None:
        """Check that its updates show what growth goes by, beside what `can` says. ConfigError if not."""

    def check_workers(self, workers: object) -> None:
        """Check `launch.workers`, a number or what changes with the stage. ConfigError if it cannot train on these."""

    def check_ranks(self, ranks: int) -> None:
        """Check that it can be cut over so many ranks. ConfigError if not."""

    def check_cut(self, model: "nn.Module", world: "World") -> None:
        """Check that it can cut the model over the ranks. ConfigError if not. Collective: every rank must call."""

    def resizes(self, optimizer: OptimizerSpec) -> bool:
        """Return whether a checkpoint goes on with another number of ranks."""
        return True

    def lateness(self, batch: int) -> list[str]:
        """Return what `plan` says of gradients that come late in no fixed order, at the largest `batch`."""
        return []

    def remarks(self, micros: Sequence[int], accum: int) -> list[str]:
        """Return what `plan` says of updates in micro-batches of sizes `micros`, up to `accum` an update."""
        return []

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
    ) -> "Engine":
        """Build the engine on this rank. Collective: every rank must call.

        Args:
            model: It is trained in place.
            loss: (model, batch) → mean loss.
            metrics: (model, batch) → means of an evaluation. None: the loss alone.
            optimizer: Its settings.
            world: The ranks.
            items: batch → number of items of which the loss is a mean. None: rows.
            tokens: batch → tokens that are counted. None: the items.
            extrapolate: Where gradients are evaluated. None: at the parameters.
            sparsity: What is pruned. None: nothing.

        Raises:
            ConfigError: It cannot train these.
        """
        self.check_optimizer(optimizer)
        parts: dict[str, Any] = {"metrics": metrics, "optimizer": optimizer, "world": world, "items": items}
        engine = self.make(model, loss, extrapolate, **parts)
        engine.tokens = items if tokens is None else tokens
        if sparsity is not None and sparsity.target:
            engine.prune_by(sparsity)
        return engine

    @abstractmethod
    def make(self, model: "nn.Module", loss: "Loss", extrapolate: Extrapolate | None, **parts: Any) -> Any:
        """Return the engine, with `metrics`, `optimizer`, `world` and `items` of `build` as `parts`.

        `extrapolate` is None if `can` lacks it.
        """


def compiles_anew(micros: Sequence[int]) -> list[str]:
    """Return what `plan` says of an engine that compiles for micro-batches of sizes `micros`; nothing if it is one."""
    if len(micros) == 1:
        return []
    return [
        f"engine.compile compiles for {counted(len(micros), 'size')} of micro-batches, {micros[0]} to "
        f"{counted(micros[-1], 'row')}; engine.max_micro={micros[0]} holds the first"
    ]
