"""Controller: Progress → Progress and Plan; the one place where batch size and learning rate are decided. Pure."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from distgrow.core.active_experts import ActiveExperts, ExpertWeights
from distgrow.core.average import AverageSpec
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, NoDecay, Span
from distgrow.core.noise_stats import Measuring
from distgrow.core.optimizer_plan import AtGrowth
from distgrow.core.order import mix_int
from distgrow.core.plan import Plan, split
from distgrow.core.progress import Outcome, Progress
from distgrow.core.sampling import SamplingSpec
from distgrow.core.scaling import Group
from distgrow.core.sparsity import Sparsity
from distgrow.core.stages import Stages, Trigger, stage_at
from distgrow.growth.adaptive import Adaptive, NormProbing
from distgrow.growth.answers import check_needs, check_sampling, checked_batch, checked_state, rates
from distgrow.growth.arguments import check_schedule
from distgrow.growth.at_growth import marked, optimizer_plan
from distgrow.growth.base import GrowthPolicy, Measure, Moment, check_settings
from distgrow.growth.draws import drawn_batch, draws_size, problems_of, split_of
from distgrow.growth.outline import Stride, outline, problems, shorten


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Decide every update of a schedule on `world` ranks. Every rank decides alike from the same Progress."""

    growth: GrowthPolicy
    stages: Stages = field(default_factory=Stages)
    lr: LR = field(default_factory=LR)
    average: AverageSpec | None = None  #: of the parameters
    active: ActiveExperts | None = None  #: of a token, if their number changes
    weights: ExpertWeights | None = None  #: of a model with experts, whose compute is counted by them
    sampling: SamplingSpec | None = None  #: of the rows of updates; None: each row once an epoch
    sparsity: Sparsity | None = None  #: of the model; None: it stays dense
    needs: frozenset[Measure] = frozenset()  #: what the optimizer needs to be measured, beside what growth needs
    at_growth: AtGrowth = field(default_factory=AtGrowth)  #: of the optimizer's settings
    budget: Budget
    epoch: int  #: samples of one pass over the training set
    world: int = 1  #: ranks of the group at hand
    group: Group | None = None  #: set if groups of other sizes may follow; None: `world` ranks throughout
    max_micro: int = 64  #: rows of a micro-batch, at most; fewer once memory has proved to hold fewer
    measuring: Measuring = field(default_factory=Measuring)
    seed: int = 0

    def __post_init__(self) -> None:
        check_schedule(self)
        object.__setattr__(self, "growth", self.growth.for_run(self._axis))
        check_needs(self.growth)
        check_sampling(self.sampling, self.epoch, self.growth, self._needs, self.measuring)
        if self.sparsity is not None and self._adaptive is not None:
            self.sparsity.check(self.budget, self.growth.name)
        check_settings(self.growth, self.stages, self.lr, self._axis)
        assert self.stage_ends is not None and self._earliest is not None  # built here, which checks the settings

    @cached_property
    def _axis(self) -> Span:
        """The samples axis as the budget alone gives it; its end is 0 if the budget is in steps."""
        return Span(samples=self.budget.total(self.epoch) or 0, epoch=self.epoch)

    @cached_property
    def stage_ends(self) -> Trigger:
        """The latest that stages end; of adaptive growth mostly never."""
        return self.growth.trigger(self.stages, self.lr, self._axis)

    @cached_property
    def _earliest(self) -> Trigger:
        """The soonest that stages end, whatever is measured."""
        return self.stage_ends if self._adaptive is None else self._adaptive.earliest(self.lr, self._axis)

    @cached_property
    def _adaptive(self) -> Adaptive | None:
        """The policy if measurements decide where its stages end."""
        return self.growth if isinstance(self.growth, Adaptive) and self.growth.adaptive else None

    @cached_property
    def _needs(self) -> frozenset[Measure]:
        return self.growth.needs | self.needs

    @cached_property
    def whole_axis(self) -> Span:
        """The samples axis, its end forecast if the budget is in steps."""
        return self._axis if self._axis.samples else Span(samples=self.samples(), epoch=self.epoch)

    @cached_property
    def span(self) -> Span:
        """The samples axis that the learning rate decays along."""
        return self._axis if isinstance(self.lr.decay, NoDecay) else self.whole_axis

    def done(self, progress: Progress) -> bool:
        """Return whether the budget is spent, or a hook has ended the run."""
        return progress.ended is not None or self.budget.left(progress, self.epoch) <= 0

    def advance(self, progress: Progress) -> Progress:
        """Return the progress at the stage that trigger or measurements decide; mostly the same.

        Another call changes nothing more, so that a run may stop between this and the update.
        """
        return marked(self.at_growth, self.growth, progress, self._advance(progress))

    def _advance(self, progress: Progress) -> Progress:
        if self._adaptive is None:
            here = progress.step if self.stage_ends.axis == "steps" else progress.ledger.applied
            stage = stage_at(self.stage_ends, progress.stage, here, self.growth.last_stage)
            return progress.grow(stage - progress.stage)
        batch, left = self.batch(progress), self.budget.left(progress, self.epoch)
        rate = self.rate(progress, batch)
        now = Moment(lr=rate, batch=batch, epoch=self.epoch, left=left, settings=self.lr, span=self.span)
        return self._adaptive.advance(progress, now)

    def after(self, progress: Progress, plan: Plan, outcome: Outcome) -> Progress:
        """Return the progress after an update that began at `progress`, with the policy's own state."""
        after = progress.after(plan, outcome)
        if outcome.told:
            after = after.with_policy(checked_state(self.growth, progress, outcome.of or plan, outcome))
        self.budget.check_counted(after)
        return after

    def heard(self, progress: Progress, plan: Plan, outcome: Outcome) -> Progress:
        """Return the progress with what an update gave that is counted already."""
        state = checked_state(self.growth, progress, plan, outcome)
        return replace(progress, skips=0).heard(plan, outcome, skips=progress.skips).with_policy(state)

    def probe_due(self, progress: Progress) -> bool:
        """Return whether growth needs ‖∇f‖ measured exactly before it decides the stage."""
        return isinstance(self.growth, NormProbing) and self.growth.probe_due(progress)

    def after_probe(self, progress: Progress, norm: float, evaluations: int) -> Progress:
        """Return the progress with an exact ‖∇f‖, charged with `evaluations`.

        Growth that has not asked for the norm does not get it, so no decision depends on when run.probe measures.
        """
        after = progress.probed(evaluations)
        if isinstance(self.growth, NormProbing) and self.growth.probe_due(progress):
            return after.with_policy(self.growth.after_probe(progress, norm))
        return after

    def probe_count(self, updates: int, stage: int) -> int:
        """Return how often growth needs ‖∇f‖ in a run of `updates` updates that ends at `stage`."""
        return self.growth.probe_count(updates, stage) if isinstance(self.growth, NormProbing) else 0

    def batch(self, progress: Progress) -> int:
        """Return the samples of the next update, or their mean if they are drawn."""
        batch, left = checked_batch(self.growth, progress.stage), self.budget.left(progress, self.epoch)
        return batch if draws_size(self.sampling) else shorten(batch, left, self.growth.start)

    def plan(self, progress: Progress) -> Plan:
        """Return the next update. Raise ConfigError if its batch cannot be split over the world."""
        batch = self.batch(progress)
        window = self.noise_window(progress, batch)
        drawn = drawn_batch(self.sampling, self.epoch, self.seed, progress, batch)
        micro, accum = self.split(progress, drawn.batch, window)
        return Plan(
            batch=drawn.batch, expected=drawn.expected, draw=drawn.draw,
            world=self.world, micro=micro, accum=accum,
            lr=self.rate(progress, batch), stage=progress.stage, seed=mix_int(self.seed, progress.samples),
            window=window, by_parameter=self.measuring.by_parameter,
            preconditioned=Measure.PRECONDITIONED in self._needs,
            product=Measure.PROGRESS in self._needs,
            average=self.average.weight(progress.ledger.applied, batch, self.whole_axis) if self.average else 0.0,
            active=self.active and self.active.at(progress, self.whole_axis),
            density=self.sparsity.planned(progress, batch, self.whole_axis.samples) if self.sparsity else 1.0,
            share=self.weights.at(progress, self.whole_axis) if self.weights else 1.0,
            optimizer=optimizer_plan(self.at_growth, self.growth, self.lr, progress, batch),
        )  # fmt: skip

    def split(self, progress: Progress, batch: int, window: int) -> tuple[int, int]:
        """Return (micro, accum) of the next update if it has `batch` samples and this noise window.

        Raises:
            ConfigError: It cannot be split.
        """
        if window and self._whole(progress, batch):
            return split(batch, 1, -(-batch // 2))  # one part alone does not show its noise
        return split_of(self.sampling, batch, self.world, self._most_rows(progress))

    def noise_window(self, progress: Progress, batch: int) -> int:
        """Return how many measured updates the noise's means remember; 0 if the next update is not measured.

        A batch that one rank can take in one micro-batch is measured only if somebody wants that: it has to be cut.
        """
        if self.sampling is not None and not self.sampling.shows_noise:
            return 0
        whole = self._whole(progress, batch)
        if whole and (batch == 1 or not (self.measuring.asked or Measure.NOISE in self._needs)):
            return 0
        every = self.measuring.every or (1 if Measure.NOISE in self._needs and not whole else 16)
        return 0 if progress.step % every else self.measuring.memory(every * batch, self.epoch)

    def _most_rows(self, progress: Progress) -> int:
        return self.max_micro if progress.micro_limit is None else min(self.max_micro, progress.micro_limit)

    def _whole(self, progress: Progress, batch: int) -> bool:
        return self.world == 1 and batch <= self._most_rows(progress)

    def ranks(self, stage: int) -> int:
        """Return the number of ranks that a stage wants."""
        group, batch = self.group, self.growth.stage_batch(stage)
        return self.world if group is None else group.scaling_policy(stage, batch, self.max_micro)

    def hands_over(self, stage: int) -> bool:
        """Return whether another group of ranks takes over before a stage."""
        return self.group is not None and self.ranks(stage) != self.group.asked

    def trial(self, micro: int) -> Plan:
        """Return a probe of micro-batches of `micro` rows on every rank."""
        batch, seed = micro * self.world, mix_int(self.seed, micro)
        return Plan(
            batch=batch, world=self.world, micro=micro, accum=1, lr=0.0, stage=0, seed=seed, probe=True,
            average=float(self.average is not None), active=self.active and self.active.most,
        )  # fmt: skip

    def largest_share(self, progress: Progress | None = None) -> int:
        """Return the rows of a rank's largest share in the run to come: no micro-batch needs more."""
        return max(-(-batch // self.ranks(stage)) for stage, batch in self.reach(progress))

    @cached_property
    def rate(self) -> Callable[[Progress, int], float]:
        """Learning rate of the next update if it has so many samples. ValueError where it is not finite."""
        return rates(self.growth, self.lr, self.span)

    def forecast(self, progress: Progress | None = None) -> Iterator[Stride]:
        """Yield the run to come as strides of equal updates, as far as this group takes it, if no update is skipped."""
        progress = progress or Progress()
        for stage, batch, updates in self.outline(progress):
            if self.hands_over(stage):
                return
            progress = progress.grow(stage - progress.stage)
            stride = Stride(begin=progress, plan=self.plan(progress), updates=updates)
            assert stride.plan.scheduled == batch
            yield stride
            progress = progress.repeat(batch, updates)

    def samples(self) -> int:
        """Return the samples that the whole run applies if no update is skipped."""
        return sum(batch * updates for _, batch, updates in self.outline(Progress()))

    def reach(self, progress: Progress | None = None) -> Iterator[tuple[int, int]]:
        """Yield (stage, batch) of all that the run may come to from `progress`, by default its beginning.

        Of adaptive growth these are the largest batches of each stage. A run that is done comes to nothing more.
        """
        progress = progress or Progress()
        if self._adaptive is None:
            yield from ((stage, batch) for stage, batch, _ in self.outline(progress))
            return
        left, start = self.budget.left(progress, self.epoch), self.growth.start
        last = max((stage for stage, _, _ in self.outline(progress, soonest=True)), default=-1)
        if self._earliest.axis == "samples" and left < math.inf:
            last = stage_at(self._earliest, last, progress.ledger.applied + int(left) - 1, self.growth.last_stage)
        for stage in range(progress.stage, last + 1):
            batch = self.growth.stage_batch(stage)
            yield stage, min(batch, self.batch(replace(progress, stage=stage)))
            yield stage, int(min(left, batch + min(start, batch) - 1))  # with what the budget may leave over

    def check(self, progress: Progress | None = None) -> None:
        """Check that every update from `progress` on, by default all of the run, can be carried out.

        Raises:
            ConfigError: The first stage that cannot be; one constraint a line.
        """
        stage = batch = 0
        for stage, batch in self.reach(progress):
            if found := self.problems(stage, batch):
                raise ConfigError("\n".join(found))
        if batch:
            self.rate(Progress(stage=stage), batch)

    def check_resumed(self, stands_at: Callable[[], Progress]) -> None:
        """Check that a run can go on from `stands_at()`, which is called only if its beginning could not be made.

        Raises:
            ConfigError: Like `check`.
        """
        try:
            self.check()
        except ConfigError:  # such as ranks that the first batches could not have fed
            self.check(stands_at())

    def problems(self, stage: int, batch: int) -> list[str]:
        """Return what keeps a batch of a stage from being drawn, split or measured."""
        world, adaptive = self.ranks(stage), self._adaptive
        found = adaptive.problems(stage, world, self.max_micro, self.measuring.every) if adaptive is not None else []
        found += problems_of(self.sampling, self.epoch, stage, batch)
        return found + problems(self.growth, stage, batch, epoch=self.epoch, world=world, max_micro=self.max_micro)

    def outline(self, progress: Progress, *, soonest: bool = False) -> Iterator[tuple[int, int, int]]:
        """Return (stage, batch, updates) of the run to come: forecast's arithmetic alone, unchecked.

        Adaptive growth is taken to be at every stage as late as it may (mostly never) or, `soonest`, as early.
        """
        ends, whole = self._earliest if soonest else self.stage_ends, draws_size(self.sampling)
        return outline(self.growth, ends, self.budget, self.epoch, progress, whole=whole)
