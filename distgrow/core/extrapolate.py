"""Extrapolate: at which shifted point the gradient of an update is evaluated; knows no engine."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.spec import PosInt, Spec


class Extrapolate(Spec):
    """The gradient of an update is evaluated at θ − ζ, and the optimizer steps from θ; after Lin et al. 2020."""

    kind: Literal["past", "fresh", "noise"]
    """The shift ζ. past: γ̂ times the mean gradient of the last applied update. fresh: γ̂ times the mean gradient of the
    same batch at θ, a second evaluation of every sample. noise: γ̂ times random directions, each filter's as long as the
    filter is."""
    rate: Annotated[float, Field(ge=0)]
    """γ̂. past and fresh: a learning rate, which no schedule moves; 0 shifts nothing. With AdamW it is that of the
    gradient in the metric of its steps. noise: a share of each filter's norm."""
    local: bool = False
    """Whether shifts are local. past: every rank shifts by its own past gradient, that of its part of the batch. fresh
    and noise: every `group` rows have a shift of their own, by their own gradient or in directions of their own."""
    group: PosInt | None = None
    """Rows that share a shift of kind fresh or noise, if it is local. They are one micro-batch."""

    @model_validator(mode="after")
    def _groups_are_local(self) -> "Extrapolate":
        if self.group is not None and self.kind == "past":
            raise ConfigError(
                f"group={self.group} would keep a past gradient for every group of rows: leave it out, as local=true "
                "keeps one for every rank; or use kind noise or fresh"
            )
        if self.local and self.group is None and self.kind != "past":
            raise ConfigError("local=true needs group, the rows that share a shift, such as group=32")
        if not self.local and self.group is not None:
            raise ConfigError(f"group={self.group} is of a local shift: add local=true, or leave it out")
        return self

    @property
    def evaluations(self) -> int:
        """Return how often each sample of an update is evaluated."""
        return 2 if self.kind == "fresh" else 1

    @property
    def shows_noise(self) -> bool:
        """Return whether the micro-batches of an update differ by their samples' noise alone.

        Those of different shifts differ by these as well. A fresh shift is made of the same noise, so the norm of the
        whole batch's gradient has another expectation.
        """
        return self.kind != "fresh" and not self.local
