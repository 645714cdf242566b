"""Evaluator: measures a run without changing it: metrics of its test set and exact gradients."""

import math
import time
from collections.abc import Iterable
from typing import Any

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.order import mix_int
from distgrow.core.progress import Progress, finite
from distgrow.data.dataset import is_stream
from distgrow.data.stream import evaluation_batches, random_parts
from distgrow.distributed.world import World
from distgrow.engine.active import activate
from distgrow.engine.batches import memory_for
from distgrow.engine.functional import Vector
from distgrow.engine.probes import Probe
from distgrow.engine.protocol import Engine
from distgrow.growth.controller import Controller
from distgrow.tasks.task import Task, test_sets
from distgrow.theory.noise import directed_critical_batch, noise_scale
from distgrow.tracking.event_log import EventLog
from distgrow.tracking.events import RESERVED, Evaluation, GradientProbe, ParameterNoise
from distgrow.training.loss_check import check_again
from distgrow.training.spec import RunSpec

Batches = Iterable[tuple[Any, int]]


class Evaluator:
    """Measure one run, and log what was measured as events."""

    def __init__(self, task: Task, controller: Controller, engine: Engine, run: RunSpec, world: World) -> None:
        """Check run.probe.

        Raises:
            ConfigError: the data set of probes is too small, or curvature is to be measured of a loss over items.
        """
        self._task, self._controller, self._engine = task, controller, engine
        self._run, self._world = run, world
        self._tests = test_sets(task.test)
        self._evaluated = (0, 0)  # step and samples of the last evaluation
        self._checked = False  # whether the loss has been checked again
        self._known: dict[str, float] | None = None  # what it found, if this process made it
        self._probed = task.train if task.probe is None else task.probe
        if task.items is not None and run.probe.curvature:
            raise ConfigError(
                "run.probe.curvature=true takes the noise of single rows, of which a loss over items is no mean: set "
                "it to false"
            )
        if not is_stream(self._probed):  # see _check_data of train_task.py
            run.probe.check(len(self._probed), world.size, controller.epoch, controller.budget.sfo)

    def evaluation_due(self, progress: Progress) -> bool:
        """Return whether a multiple of run.eval lies between the last evaluation and here. The end has its own."""
        crossed = self._run.eval.crossed(self._evaluated, (progress.step, progress.samples), self._controller.epoch)
        return crossed and not self._controller.done(progress)

    def evaluate(self, progress: Progress, events: EventLog) -> dict[str, float]:
        """Evaluate the test sets and log their metrics once. Collective: every rank must call.

        Raises:
            ConfigError: a metric has the name of a key that every event has, or the loss is no mean: see check_again.
        """
        self._activate(progress)
        if not self._checked and progress.step and not self._controller.done(progress):
            self._checked = True
            most = min(self._controller.max_micro, progress.micro_limit or self._controller.max_micro)
            check_again(self._task, self._controller, self._world, most=most)
        place = (progress.step, progress.samples)
        if place != self._evaluated:
            self._log_parameters(progress, events)
        if not self._tests:
            self._evaluated = place
            return {}
        if self._known is not None and place == self._evaluated:
            return self._known
        rows = min(self._run.eval.rows, progress.micro_limit or self._run.eval.rows)
        with memory_for(f"evaluation batches of {counted(rows, 'row')}", "lower run.eval.rows and go on with --resume"):
            metrics = self._measured(rows)
            if self._controller.average is not None:
                with self._engine.at_average() as there:
                    averaged = self._measured(rows) if there else {}
                metrics |= {f"average/{name}": value for name, value in averaged.items()}
        if clash := RESERVED & metrics.keys():
            raise ConfigError(f"task.metrics returns {', '.join(sorted(clash))}, which every event has; rename it")
        if place != self._evaluated:  # else it was, before the run was resumed
            epoch = progress.samples / self._controller.epoch
            shown = {name: finite(value) for name, value in metrics.items()}
            events.log(Evaluation(**events.place(progress), epoch=epoch, more=shown))
        self._evaluated, self._known = place, metrics
        return metrics

    def validation(self, progress: Progress, test: str | None, metric: str) -> float:
        """Return one metric at the engine's present parameters, of the test set with this name or the only one.

        Forward passes: the ledger counts nothing. Collective: every rank must call.

        Raises:
            ConfigError: task.metrics does not return it.
        """
        self._activate(progress)
        dataset = self._tests[next(iter(self._tests)) if test is None else test]
        rows = min(self._run.eval.rows, progress.micro_limit or self._run.eval.rows)
        metrics = self._engine.evaluate(self._batches(dataset, rows))
        if metric not in metrics:  # its code failed as the first rows were tried
            raise ConfigError(f"growth.metric={metric}: task.metrics returns {', '.join(metrics)}; choose one of them")
        return metrics[metric]

    def _activate(self, progress: Progress) -> None:
        """Let the model use the experts that the coming update would, so that a resumed run measures the same."""
        active = self._controller.active
        activate(self._task.model, active and active.at(progress, self._controller.whole_axis))

    def _log_parameters(self, progress: Progress, events: EventLog) -> None:
        """Log the noise of each parameter, if it is measured."""
        if not self._run.noise.by_parameter:
            return
        found = self._engine.parameter_noise()
        squares, traces = ([finite(pair[k]) for pair in found.values()] for k in (0, 1))
        place = events.place(progress)
        events.log(ParameterNoise(**place, names=list(found), grad_sq=squares, noise_trace=traces))

    def outdate(self) -> None:
        """Have the test set evaluated again even where it was: the engine has moved since."""
        self._known = None

    def _measured(self, rows: int) -> dict[str, float]:
        """Return the metrics of every test set at the engine's present parameters, as name/metric if it has a name."""
        found: dict[str, float] = {}
        for test, dataset in self._tests.items():
            metrics = self._engine.evaluate(self._batches(dataset, rows))
            found |= {f"{test}/{name}" if test else name: value for name, value in metrics.items()}
        return found

    def resume(self, evaluated: tuple[int, int]) -> None:
        """Take (step, samples) of the newest evaluation that the run has logged."""
        self._evaluated = evaluated

    def probe_due(self, progress: Progress) -> bool:
        """Return whether growth or run.probe wants ‖∇f‖ before the coming update and does not have it yet.

        A budget of gradient evaluations must leave some for that update.
        """
        if not (self._controller.probe_due(progress) or self._wished(progress)):
            return False
        budget = self._controller.budget
        return budget.sfo is None or budget.left(progress, self._controller.epoch) > len(self._probed)

    def _wished(self, progress: Progress) -> bool:
        return self._run.probe.due(progress, self._controller.epoch)

    def last(self, progress: Progress, events: EventLog) -> Progress:
        """Probe at the run's end if run.probe is set, and return the progress. Collective: every rank must call."""
        return self.probe(progress, events) if self._run.probe.due_at_the_end(progress) else progress

    def probe(self, progress: Progress, events: EventLog) -> Progress:
        """Measure what is due. Return the progress with it, charged with the evaluations.

        Collective: every rank must call.

        Raises:
            ConfigError: a probe before the first update used up the budget.
        """
        self._activate(progress)
        began, asked = time.monotonic(), self._controller.probe_due(progress)
        rows = min(self._run.probe.rows, progress.micro_limit or self._run.probe.rows)
        with memory_for(f"a probe's batches of {counted(rows, 'row')}", "lower run.probe.rows and go on with --resume"):
            probe = Probe(self._engine, self._world, lambda: self._batches(self._probed, rows), self._task.items)
            loss, gradient = probe.gradient()
            norm = probe.norm(gradient)
            curvature: dict[str, float] = {}
            if self._run.probe.curvature and (self._wished(progress) or not asked):
                curvature = self._curvature(probe, progress, gradient, norm)
        evaluations = probe.passes * len(self._probed)
        after = self._controller.after_probe(progress, norm, evaluations)
        assert not self.probe_due(after), "a probe must be known once it is made"
        event = GradientProbe(
            **events.place(after),
            epoch=progress.samples / self._controller.epoch,
            evaluations=evaluations,
            sfo_probe=after.ledger.probe,
            norm=finite(norm),
            loss=finite(loss),
            seconds=time.monotonic() - began,
            more={name: finite(value) for name, value in curvature.items()},
        )
        events.log(event)
        if after.samples == 0 and self._controller.done(after):
            raise ConfigError(
                f"budget.sfo={self._controller.budget.sfo}: the exact probe before the first update took "
                f"{after.ledger.probe} gradient evaluations; raise it, or leave out run.probe.curvature"
            )
        return after

    def _curvature(self, probe: Probe, progress: Progress, gradient: Vector, norm: float) -> dict[str, float]:
        """Return the figures that run.probe.curvature adds. Some are NaN if the gradient is 0."""
        spec, samples, seed = self._run.probe, len(self._probed), mix_int(self._run.seed, progress.samples)
        orders = (mix_int(seed, 1), mix_int(seed, 2))
        pairs = zip(*(self._parts(min(spec.parts, samples), order) for order in orders), strict=True)
        noise = probe.noise(gradient, samples, pairs)
        smoothness, products = probe.smoothness(tolerance=spec.tolerance, most=spec.iterations, seed=seed)
        along, trace, lr = probe.curvature(gradient), noise.trace.value, self._rate(progress)
        noise_curvature = noise.curved.value / trace if trace else math.nan
        critical = math.nan
        if min(lr, norm, trace) > 0:
            critical = directed_critical_batch(trace, norm**2, lr, along, noise_curvature)
        return {
            "smoothness": smoothness,
            "smoothness_products": products,
            "curvature": along,
            "noise_trace": trace,
            "noise_trace_error": noise.trace.error,
            "noise_curvature": noise_curvature,
            "noise_curvature_error": noise.curved.error / trace if trace else math.nan,
            "noise_scale": noise_scale(trace, norm**2),
            "lr": lr,
            "critical_batch": critical,
        }

    def _rate(self, progress: Progress) -> float:
        """Return the learning rate at the batch of the current stage."""
        return self._controller.rate(progress, self._controller.growth.stage_batch(progress.stage))

    def _parts(self, parts: int, seed: int) -> Batches:
        return random_parts(self._probed, self._world, parts, seed, self._task.collate)

    def _batches(self, dataset: Any, rows: int) -> Batches:
        return evaluation_batches(dataset, self._world, rows, self._task.collate)
