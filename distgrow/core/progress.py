"""Progress and its Ledger: what a run has done, the only record that decisions are made from. Knows no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from distgrow.core.noise_stats import NOTHING, Measured, Noise
from distgrow.core.plan import Plan

#: A growth policy's own state: plain numbers by name. Policies differ in what they keep.
PolicyState = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Count the per-sample gradient evaluations (SFO calls) of the whole cluster, by purpose."""

    applied: int = 0  #: in updates that moved the parameters or, with a delay, will move them
    skipped: int = 0  #: in updates that were not finite and therefore not applied
    replayed: int = 0  #: spent before a crash and spent again after it
    discarded: int = 0  #: thrown away: by a retry of the same batch, or as a gradient came too late to be applied
    probe: int = 0  #: in measurements that move nothing: trials of a micro-batch, exact gradient norms
    extrapolated: int = 0  #: for the point alone where an update's gradient is evaluated

    def with_applied(self, batch: int) -> "Ledger":
        """Return the counts with a batch that was applied."""
        return Ledger(
            applied=self.applied + batch, skipped=self.skipped, replayed=self.replayed, discarded=self.discarded,
            probe=self.probe, extrapolated=self.extrapolated,
        )  # fmt: skip

    @property
    def total(self) -> int:
        """Return all evaluations: the SFO complexity spent so far."""
        return self.first_time + self.replayed + self.discarded

    @property
    def first_time(self) -> int:
        """Return the evaluations that an undisturbed run would also have spent: all but replayed and discarded ones."""
        return self.applied + self.skipped + self.probe + self.extrapolated


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Hold a batch that was counted as applied when it was handed out, and whose gradient then was not applied."""

    batch: int  #: its samples
    stage: int  #: of the batch schedule
    tokens: int = 0  #: in it, if they are counted
    finite: bool = True  #: False: its gradient was not finite; True: it came too late
    spared: float = 0.0  #: its samples that were spared


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """Hold what has become of updates otherwise than they were counted."""

    lost: tuple[Lost, ...] = ()
    wasted: int = 0  #: evaluations that were lost with a worker, and made again by another


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Hold what one update did. It is equal on every rank."""

    applied: bool = True  #: False: no parameter moved, as the gradient was not finite or a rank ran out of memory
    out_of_memory: bool = False  #: some rank ran out of memory: the same batch can be tried in smaller micro-batches
    loss: float = math.nan  #: mean loss over the B samples of the global batch
    grad_norm: float = math.nan  #: Euclidean norm of the mean gradient, before clipping
    measured: Measured = NOTHING  #: of the gradient's noise
    empty: bool = False  #: the batch counted no items, so there was no gradient
    tokens: int = 0  #: of the global batch; 0 if nobody counts them
    votes: tuple[bool, ...] = ()  #: which of the ranks' votes anyone has cast
    delay: int = 0  #: updates after which its gradient is applied
    extrapolated: int = 0  #: of its samples, those that were evaluated a second time, for the gradient's point
    withdrawn: Withdrawn | None = None  #: of earlier updates; the present one counts as applied beside it
    fault: str | None = None  #: why no update can follow
    told: bool = True  #: False: what the update gave is told with the next one, and nothing is known yet
    of: Plan | None = (
        None  #: the update before, if all but `out_of_memory` is what that one gave; None: the present one
    )

    @property
    def late(self) -> bool:
        """Return whether a gradient was not applied because it came too late."""
        return self.withdrawn is not None and any(lost.finite for lost in self.withdrawn.lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Hold everything but the engine's state that a checkpoint needs.

    `samples` is the cursor in the endless sample stream. Schedules and budgets read `ledger.applied`, which lags behind
    the cursor by the samples of skipped updates.

    With `engine.delay` τ an update counts once its gradient is accepted: finite, and in memory on every rank. That is
    when it is charged, as applied, and when all counts move. It is applied τ accepted updates later, and it cannot be
    lost in between: it is in every checkpoint, and the engine applies what is left at the end of the run. So budgets,
    stages and learning rates are those of the same run without a delay. Evaluations, probes and exports see the
    parameters as they are, which the last τ accepted gradients have not moved yet. What belongs to an update goes with
    its gradient: learning rate, what the optimizer's settings follow, and the weight in the average of the parameters.

    With asynchronous workers an update counts once its batch is handed out. Whether its gradient will be applied is not
    known then. If it is not, the update is withdrawn: its samples move from applied to discarded (it came too late) or
    to skipped (not finite), and the budget, which reads applied, has as many left. A stage that is over stays over.

    With `engine.ahead` an update counts once it is begun, too. What it gave, its loss, norm, noise and tokens, is known
    after the next one has begun: decisions see what updates up to the last but one gave. One that was not finite is
    withdrawn then.
    """

    step: int = 0  #: applied updates
    samples: int = 0  #: positions of the sample stream consumed
    stage: int = 0  #: of the batch schedule
    stage_samples: int = 0  #: samples applied since the stage began
    stage_step: int = 0  #: updates applied since the stage began
    grown_step: int = 0  #: updates applied before the batch last changed, if the optimizer then forgets
    grown_samples: int = 0  #: their samples
    skips: int = 0  #: updates skipped in a row, up to now
    micro_limit: int | None = None  #: rows of a micro-batch that memory holds, where that has been found out
    policy: PolicyState = field(default_factory=dict, hash=False)  #: what the policy keeps; empty: its initial state
    noise: Noise = field(default_factory=Noise)
    tokens: int = 0  #: applied tokens, if they are counted
    probe_samples: int = -1  #: positions consumed at the last exact probe, for whatever it was made; -1: none was
    density: float = 1.0  #: of the last applied update, as the model is pruned
    spared: float = 0.0  #: samples that pruning and experts have spared: Σ b·(1 − density) over applied updates
    ended: str | None = None  #: why a hook has ended the run before its budget
    ledger: Ledger = field(default_factory=Ledger)

    def after(self, plan: Plan, outcome: Outcome) -> "Progress":
        """Return the progress after `outcome`. This is the one place where gradient evaluations are counted.

        The policy's own state is left as it is; Controller.after sees to that.
        """
        ledger, batch = self.ledger, plan.batch
        if plan.probe:
            return replace(self, ledger=replace(ledger, probe=ledger.probe + batch))
        if outcome.out_of_memory:  # the same batch again: neither the cursor nor the run of skips moves
            discarded = replace(ledger, discarded=ledger.discarded + batch + outcome.extrapolated)
            return replace(self, micro_limit=plan.micro // 2, ledger=discarded)
        if outcome.extrapolated:
            ledger = replace(ledger, extrapolated=ledger.extrapolated + outcome.extrapolated)
        if not outcome.applied and outcome.withdrawn is None:
            skipped = replace(ledger, skipped=ledger.skipped + batch)
            return replace(self, samples=self.samples + batch, skips=self.skips + 1, ledger=skipped)
        noise = self.noise if plan.density == self.density else self.noise.on_new_stage()  # of another model
        after = Progress(  # replace() takes many times longer
            step=self.step + 1,
            samples=self.samples + batch,
            stage=self.stage,
            stage_samples=self.stage_samples + batch,
            stage_step=self.stage_step + 1,
            grown_step=self.grown_step,
            grown_samples=self.grown_samples,
            skips=0 if outcome.told else self.skips,
            micro_limit=self.micro_limit,
            policy=self.policy,
            noise=self._shown(noise, outcome.of or plan, outcome),
            tokens=self.tokens + outcome.tokens,
            probe_samples=self.probe_samples,
            density=plan.density,
            spared=self.spared + plan.spared,
            ledger=ledger.with_applied(batch),
        )
        return after if outcome.withdrawn is None else after.without(outcome.withdrawn, skips=self.skips)

    def heard(self, plan: Plan, outcome: Outcome, *, skips: int) -> "Progress":
        """Return the progress with what an update gave that is counted already.

        Args:
            plan: That update's.
            outcome: What it gave.
            skips: Updates skipped in a row before it.
        """
        heard = replace(self, noise=self._shown(self.noise, plan, outcome), tokens=self.tokens + outcome.tokens)
        return heard if outcome.withdrawn is None else heard.without(outcome.withdrawn, skips=skips)

    def _shown(self, noise: Noise, plan: Plan, outcome: Outcome) -> Noise:
        """Return the statistics with what an update has shown, unless another stage has begun since."""
        if plan.stage != self.stage:
            return noise
        return noise.after(
            plan.batch, outcome.measured.parts or plan.parts, plan.window, outcome.measured, outcome.loss
        )

    def as_if_known(self, outcome: Outcome, noise: Noise) -> "Progress":
        """Return the progress as it would have been if what its last update gave had been known at once.

        Args:
            outcome: What it gave.
            noise: The statistics with it.
        """
        known = replace(self, noise=noise, tokens=self.tokens + outcome.tokens)
        return known if outcome.withdrawn is None else known.without(outcome.withdrawn, skips=self.skips)

    def without(self, withdrawn: Withdrawn, *, skips: int = 0) -> "Progress":
        """Return the progress without updates that were counted as applied and were not.

        Args:
            withdrawn: Those updates, and what was evaluated twice.
            skips: Updates skipped in a row before them.
        """
        late = [lost for lost in withdrawn.lost if lost.finite]
        failed = [lost for lost in withdrawn.lost if not lost.finite]
        here = [lost.batch for lost in withdrawn.lost if lost.stage == self.stage]
        skipped, discarded = sum(lost.batch for lost in failed), sum(lost.batch for lost in late)
        ledger = replace(
            self.ledger,
            applied=self.ledger.applied - skipped - discarded,
            skipped=self.ledger.skipped + skipped,
            discarded=self.ledger.discarded + discarded + withdrawn.wasted,
        )
        return replace(
            self,
            step=self.step - len(withdrawn.lost),
            stage_samples=self.stage_samples - sum(here),
            stage_step=self.stage_step - len(here),
            skips=skips + len(failed) if failed else self.skips,
            tokens=self.tokens - sum(lost.tokens for lost in withdrawn.lost),
            spared=self.spared - sum(lost.spared for lost in withdrawn.lost),
            ledger=ledger,
        )

    @property
    def compute(self) -> float:
        """Return Σ b·density over applied updates, in samples of the dense model."""
        return self.ledger.applied - self.spared

    def with_policy(self, state: PolicyState) -> "Progress":
        """Return the progress with another state of the policy's own."""
        return self if state is self.policy else replace(self, policy=state)

    def grow(self, stages: int) -> "Progress":
        """Return the progress at a stage that is `stages` (0 or more) later."""
        if stages == 0:
            return self
        noise = self.noise.on_new_stage()
        return replace(self, stage=self.stage + stages, stage_samples=0, stage_step=0, noise=noise)

    def at_another_batch(self) -> "Progress":
        """Return the progress if its stage has another batch than the updates before."""
        return replace(self, grown_step=self.step, grown_samples=self.ledger.applied)

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

    def probed(self, evaluations: int) -> "Progress":
        """Return the progress charged with the evaluations of an exact measurement of ‖∇f‖ here."""
        ledger = replace(self.ledger, probe=self.ledger.probe + evaluations)
        return replace(self, probe_samples=self.samples, ledger=ledger)

    def replaying(self, lost: int) -> "Progress":
        """Return the progress charged with `lost` evaluations that a crash discarded and that are made again."""
        return replace(self, ledger=replace(self.ledger, replayed=self.ledger.replayed + lost))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for progress.json."""
        values = asdict(self)
        if not self.ledger.extrapolated:  # as earlier versions read it
            del values["ledger"]["extrapolated"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the progress of plain numbers. The inverse of `to_dict`; it reads older files as well."""
        values = _with_policy(values) if "policy" not in values else values
        parts = {"ledger": Ledger(**values["ledger"]), "noise": Noise.from_dict(values["noise"])}
        return cls(**{**values, **parts})


def _with_policy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain numbers whose policy state is one field. Versions up to 0.1 had a field for each of its numbers."""
    rest = {key: value for key, value in values.items() if key not in _OLD_STATE}
    state = {name: values[key] for key, (name, initial) in _OLD_STATE.items() if values.get(key, initial) != initial}
    return {**rest, "policy": state}


#: Older names of what three policies keep: the present name, and the value that stood for none.
_OLD_STATE = {
    "cooling": ("drops", 0),
    "worth": ("samples", 0.0),
    "probe_norm": ("norm", None),
    "probe_step": ("norm_step", None),
}


def finite(value: float) -> float | None:
    """Return `value`, or None if it is not finite. JSON has no NaN."""
    return value if math.isfinite(value) else None
