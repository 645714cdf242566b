"""One global batch of gradient accumulation and one optimizer step, for every engine; knows none of them.

An engine is a subclass that gives `backward`, `skip` and `apply`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from distgrow.core.noise_stats import NOTHING, Measured
from distgrow.core.order import mix_int
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Withdrawn
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import World
from distgrow.engine.active import activate
from distgrow.engine.averages import WeightAverage
from distgrow.engine.batches import Buffers, Loss, Metrics, drawn_rows, memory_for
from distgrow.engine.items import Items, Tokens, Weights, mean_loss
from distgrow.engine.masks import Masks
from distgrow.engine.metrics import means
from distgrow.engine.noise.hooks import MicroBatchNorms, StepProducts
from distgrow.engine.noise.metric import Roots
from distgrow.engine.noise.shown import shown_noise
from distgrow.engine.objective import WeightedLoss, check_dense, check_leaves, check_single_row, penalties_of
from distgrow.engine.stats import LOW, Applied, MakeStats, UpdateStats
from distgrow.optim import OptimizerSpec


class AccumulatingEngine(ABC):
    """Compute exact mean gradients over a global batch, whatever world and micro-batch the plan has."""

    sharded: ClassVar[bool] = False  #: whether a rank's optimizer sees only its shards of the gradient
    delay: int = 0  #: updates after which a gradient is applied
    ahead: int = 0  #: updates after which `update` tells what an update gave

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        metrics: Metrics | None,
        optimizer: OptimizerSpec,
        world: World,
        items: Items | None = None,
    ) -> None:
        """Take over a model that is where it will train; `items` counts what the loss is a mean over, if not rows.

        Raises:
            ConfigError: Its gradients would be sparse.
        """
        self.model, self.world, self.evaluations = model, world, 0
        self._objective = WeightedLoss(model, loss)
        check_dense(self._objective)
        self._items, self._metrics = items, metrics or mean_loss(loss, items)
        self.tokens: Tokens | None = items
        self._loss, self._optimizer_spec = loss, optimizer
        self.groups = optimizer.shown(self._objective.named(), model)
        self._penalties = penalties_of(self._objective, optimizer)
        self._parameters, self._buffers = self._objective.trained(), Buffers(self._objective)
        self._norms = MicroBatchNorms(self._parameters, world.size, each=optimizer.goes_by_parts)
        self._products = StepProducts(optimizer)
        self._checked = False
        self._average: WeightAverage | None = None  # until an update asks for one
        self._masks: Masks | None = None  # of a model that is pruned

    # ── what an engine gives ────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def backward(self, plan: Plan, batch: Any, weight: float, stats: MakeStats | None) -> Tensor | None:
        """Add a micro-batch's gradient; return its weighted loss, None if memory did not hold it.

        An update's last micro-batch has `stats`, for an engine that reduces them along with the gradient. A micro-batch
        that counts nothing has weight 0, and its loss may be 0/0: it adds no gradient.
        """

    @abstractmethod
    def skip(self, *, last: bool) -> None:
        """Take part in what ranks do together in place of a micro-batch, so that no rank applies the update."""

    @abstractmethod
    def apply(self, plan: Plan, stats: UpdateStats) -> Applied:
        """Reduce this rank's `stats` and the gradient over ranks, clip it, and step at `plan.lr`. Collective.

        With items, the gradient is first divided by the mean of `stats.weight` over ranks. A gradient that is not
        finite, or not whole, moves nothing, nor does one without any items.
        """

    @abstractmethod
    def place(self, batch: Any) -> Any:
        """Return the batch on this rank's device, in the precision that the model takes."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[Any]:
        """Return the context that metrics are computed in."""

    def drain(self) -> bool:
        """See Engine; by default nothing is in flight."""
        return False

    def last(self) -> tuple[Plan, Outcome] | None:
        """See Engine; by default everything is told at once."""
        return None

    def withdrawn(self) -> Withdrawn | None:
        """See Engine; by default updates are what they were counted as."""
        return None

    def parameter_noise(self) -> dict[str, tuple[float, float]]:
        """See Engine; by default nothing is measured by parameter."""
        return {}

    def averaged(self) -> dict[str, Tensor]:
        """Return what an average is made of: the trained parameters, or this rank's shards of them, and buffers."""
        return self._objective.averaged()

    def reserve(self, plan: Plan) -> Any:
        """Return what takes the memory that a step would, for a trial that makes none; by default nothing."""
        return None

    def roots(self, plan: Plan) -> Roots | None:
        """Return √P of the coming step −η·P·g, if the plan's noise is measured in that metric; by default None."""
        return None

    def loss_scale(self) -> float:
        """Return what the loss is multiplied by against underflow."""
        return 1.0

    def all_seen(self) -> bool:
        """Return whether hooks have seen all gradients of a micro-batch, when its statistics are asked for."""
        return True

    # ── what all engines share ──────────────────────────────────────────────────────────────────────────────────

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine.

        Raises:
            ConfigError: A micro-batch does not have the rows that the plan gave it.
        """
        self._begin(plan)
        reserved = self.reserve(plan) if plan.probe else None
        stats = self.accumulate(plan, micro_batches, votes)
        del reserved
        result = self.apply(plan, stats)
        if not result.applied:
            self._buffers.restore()
        elif average := plan.average if result.average is None else result.average:
            self.average().update(average)
        return self._outcome(plan, result)

    def _outcome(self, plan: Plan, result: Applied) -> Outcome:
        """Return what an update gave. Collective."""
        if result.out_of_memory:
            return Outcome(applied=False, out_of_memory=True)
        empty = self._items is not None and not result.stats.weight
        if self._items is not None:
            result = result._replace(stats=result.stats.over_items())
        return Outcome(
            applied=result.applied,
            empty=empty,
            loss=float(result.stats.loss),
            grad_norm=result.grad_norm,
            measured=self._measured(plan, result) if result.applied else NOTHING,
            tokens=result.stats.all_tokens(self.world.size),
            votes=tuple([cast > 0 for cast in result.stats.votes]),
            delay=self.delay,
        )

    def _measured(self, plan: Plan, result: Applied) -> Measured:
        """Return what an applied update has shown of the noise. Collective."""
        if not (plan.window or plan.product):
            return NOTHING
        sums = self._products.fetch() if result.products is None else result.products
        return shown_noise(
            plan,
            result.stats,
            self._products.results(sums, result.grad_norm),
            self.world,
            grad_norm=result.grad_norm,
            metric_sq=result.metric_sq,
            sharded=self.sharded,
            stepped=result.products is None and self._products.wanted,
            items=self._items is not None,
        )

    def _begin(self, plan: Plan) -> None:
        """Prepare an update: random numbers, masks, and what is measured. Collective."""
        seed_generators(mix_int(plan.seed, self.world.rank), self.world.device)
        activate(self.model, plan.active)
        self._buffers.keep()
        if self._masks is not None:
            self._masks.follow(plan.density)
        self._norms.begin(plan, self.roots(plan))
        self._products.begin(plan)

    def accumulate(
        self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = (), *, rank: int | None = None
    ) -> UpdateStats:
        """Add a rank's part of the gradient, by default this one's; return its part of the statistics.

        Once memory did not hold a micro-batch, the others are skipped. Rows count as evaluated once they are begun.

        Raises:
            SingleRow: BatchNorm met a micro-batch of one row.
        """
        try:
            return self._accumulate(plan, micro_batches, votes, self.world.rank if rank is None else rank)
        except ValueError as error:
            check_single_row(error)
            raise

    def _accumulate(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool], rank: int) -> UpdateStats:
        losses: list[Tensor] = []
        sent: list[UpdateStats] = []
        weights = Weights(plan, self._items, self.tokens)

        def stats(loss: Tensor) -> UpdateStats:
            sent.append(self._stats(plan, weight, weights, sum(losses, start=loss), votes))
            return sent[0]

        failed = False
        for k, (batch, rows) in enumerate(drawn_rows(plan, rank, micro_batches), start=1):
            last = k == plan.accum
            self.evaluations += rows
            if failed:
                self.skip(last=last)
                continue
            weight = weights.of(batch, rows)
            loss = self.backward(plan, batch, weight, stats if last else None)
            failed = loss is None
            if loss is not None and not last:
                self._norms.end(weight, self.loss_scale())
                losses.append(loss)
            elif loss is not None and not sent:
                stats(loss)
        return UpdateStats(failed=1.0) if failed else sent[0]

    def _stats(self, plan: Plan, weight: float, weights: Weights, loss: Tensor, votes: Sequence[bool]) -> UpdateStats:
        """Return this rank's part, once the last micro-batch's gradients are there; `weight` is that one's."""
        measured = plan.window > 0 and self.all_seen()
        self._norms.end(weight, self.loss_scale())
        total = self._norms.total() if measured else None
        if measured and not weights.parts:
            total = 0.0
        return UpdateStats(
            loss=loss,
            micro_sq=0.0 if total is None else total,
            measured=float(total is not None),
            batch=float(plan.told),
            lr=plan.lr,
            weight=weights.total,
            parts=float(weights.parts),
            tokens=divmod(weights.tokens, LOW),
            votes=tuple(map(float, votes)),
        )

    def settings(self, plan: Plan) -> dict[str, float]:
        """See Engine."""
        return self._optimizer_spec.at(plan.optimizer)

    def average(self) -> WeightAverage:
        """Return the average of the parameters, begun here if there is none."""
        if self._average is None:
            with memory_for("the average of the parameters", "leave out average, or use a smaller model"):
                self._average = WeightAverage(self.averaged())
        return self._average

    @contextmanager
    def at_average(self) -> Iterator[bool]:
        """See Engine."""
        if self._average is None or not self._average.begun:
            yield False
            return
        with self._average.swapped():
            yield True

    def evaluate(self, batches: Iterable[tuple[Any, int]]) -> dict[str, float]:
        """See Engine."""
        self.world.share(list(self._objective.buffers()))
        was_training = self.model.training
        self._objective.eval()
        with self.evaluating():
            values = means(lambda batch: self._metrics(self.model, self.place(batch)), batches, self.world)
        self._objective.train(was_training)
        return values

    def check_leaves(self, loss: Tensor, own: Iterable[nn.Parameter] = ()) -> None:
        """Check, once, that the loss depends on no trainable parameter but those that train and the engine's `own`.

        Raises:
            ConfigError: It does.
        """
        if self._checked:
            return
        self._checked = True
        check_leaves(loss, [*self._parameters, *own])
