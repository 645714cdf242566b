"""Progress and its Ledger: what a run has done, the only record that decisions are made from. Knows no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, Self

from distgrow.core.noise_stats import Measured, Noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Count the per-sample gradient evaluations (SFO calls) of the whole cluster, by purpose."""

    applied: int = 0  #: in updates that moved the parameters
    skipped: int = 0  #: in updates that were not finite and therefore not applied
    replayed: int = 0  #: spent before a crash and spent again after it
    discarded: int = 0  #: thrown away by a retry of the same batch
    probe: int = 0  #: in measurements that move nothing: trials of a micro-batch, exact gradient norms

    @property
    def total(self) -> int:
        """Return all evaluations: the SFO complexity spent so far."""
        return self.applied + self.skipped + self.replayed + self.discarded + self.probe

    @property
    def first_time(self) -> int:
        """Return the evaluations that an undisturbed run would also have spent: all but replayed and discarded ones."""
        return self.applied + self.skipped + self.probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold what one update did. It is equal on every rank."""

    applied: bool = True  #: False: no parameter moved, as the gradient was not finite or a rank ran out of memory
    out_of_memory: bool = False  #: some rank ran out of memory: the same batch can be tried in smaller micro-batches
    loss: float = math.nan  #: mean loss over the B samples of the global batch
    grad_norm: float = math.nan  #: Euclidean norm of the mean gradient, before clipping
    measured: Measured = field(default_factory=Measured)  #: of the gradient's noise
    votes: tuple[bool, ...] = ()  #: which of the ranks' votes anyone has cast


class Batched(Protocol):
    """Describe the part of a Plan that Progress reads."""

    @property
    def batch(self) -> int: ...
    @property
    def micro(self) -> int: ...
    @property
    def parts(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def worth(self) -> float: ...
    @property
    def probe(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Hold everything but the engine's state that a checkpoint needs.

    `samples` is the cursor in the endless sample stream. Schedules and budgets read `ledger.applied`, which lags behind
    the cursor by the samples of skipped updates.
    """

    step: int = 0  #: applied updates
    samples: int = 0  #: positions of the sample stream consumed
    stage: int = 0  #: rung of the growth ladder
    stage_samples: int = 0  #: samples applied since the stage began
    stage_step: int = 0  #: updates applied since the stage began
    skips: int = 0  #: updates skipped in a row, up to now
    micro_limit: int | None = None  #: rows of a micro-batch that memory holds, where that has been found out
    cooling: int = 0  #: steps that the temperature has fallen by, where plateaus decide that
    worth: float = 0.0  #: samples at b₀ that the applied ones were worth, where AdaScale counts them
    noise: Noise = field(default_factory=Noise)
    probe_norm: float | None = None  #: ‖∇f‖ at the last exact probe that growth asked for
    probe_step: int | None = None  #: applied updates when it was made
    probe_samples: int = -1  #: positions consumed at the last exact probe, for whatever it was made; -1: none was
    ledger: Ledger = field(default_factory=Ledger)

    def after(self, plan: Batched, outcome: Outcome) -> "Progress":
        """Return the progress after `outcome`. This is the one place where gradient evaluations are counted."""
        ledger, batch = self.ledger, plan.batch
        if plan.probe:
            return replace(self, ledger=replace(ledger, probe=ledger.probe + batch))
        if outcome.out_of_memory:  # the same batch again: neither the cursor nor the run of skips moves
            discarded = replace(ledger, discarded=ledger.discarded + batch)
            return replace(self, micro_limit=plan.micro // 2, ledger=discarded)
        if not outcome.applied:
            skipped = replace(ledger, skipped=ledger.skipped + batch)
            return replace(self, samples=self.samples + batch, skips=self.skips + 1, ledger=skipped)
        return Progress(
            step=self.step + 1,
            samples=self.samples + batch,
            stage=self.stage,
            stage_samples=self.stage_samples + batch,
            stage_step=self.stage_step + 1,
            micro_limit=self.micro_limit,
            cooling=self.cooling,
            worth=self.worth + plan.worth,
            noise=self.noise.after(batch, plan.parts, plan.window, outcome.measured, outcome.loss),
            probe_norm=self.probe_norm,
            probe_step=self.probe_step,
            probe_samples=self.probe_samples,
            ledger=replace(ledger, applied=ledger.applied + batch),
        )

    def climb(self, rungs: int) -> "Progress":
        """Return the progress at a stage that is `rungs` (0 or more) higher."""
        if rungs == 0:
            return self
        noise = self.noise.on_new_stage()
        return replace(self, stage=self.stage + rungs, stage_samples=0, stage_step=0, noise=noise)

    def cool(self, steps: int) -> "Progress":
        """Return the progress at a temperature that is `steps` (0 or more) lower."""
        return replace(self, cooling=self.cooling + steps, noise=self.noise.on_new_stage()) if steps else self

    def repeat(self, batch: int, updates: int) -> "Progress":
        """Return the progress after `updates` applied updates of `batch` samples each."""
        done = batch * updates
        return replace(
            self,
            step=self.step + updates,
            samples=self.samples + done,
            stage_samples=self.stage_samples + done,
            stage_step=self.stage_step + updates,
            skips=0 if updates else self.skips,
            ledger=replace(self.ledger, applied=self.ledger.applied + done),
        )

    def probed(self, norm: float, evaluations: int) -> "Progress":
        """Return the progress with an exact ‖∇f‖, charged with the evaluations that it took."""
        return replace(self.surveyed(evaluations), probe_norm=norm, probe_step=self.step)

    def surveyed(self, evaluations: int) -> "Progress":
        """Return the progress charged with a probe that no decision depends on."""
        ledger = replace(self.ledger, probe=self.ledger.probe + evaluations)
        return replace(self, probe_samples=self.samples, ledger=ledger)

    def replaying(self, lost: int) -> "Progress":
        """Return the progress charged with `lost` evaluations that a crash discarded and that are made again."""
        return replace(self, ledger=replace(self.ledger, replayed=self.ledger.replayed + lost))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for progress.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the progress of plain numbers. The inverse of `to_dict`."""
        parts = {"ledger": Ledger(**values["ledger"]), "noise": Noise.from_dict(values["noise"])}
        return cls(**{**values, **parts})


def finite(value: float) -> float | None:
    """Return `value`, or None if it is not finite. JSON has no NaN."""
    return value if math.isfinite(value) else None
