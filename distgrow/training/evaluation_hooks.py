"""Hooks that go by evaluations: the best checkpoint, early stopping, and samples of what the model makes."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.data.seeding import kept_generators, seed_generators
from distgrow.run.folder import RunFolder, storing
from distgrow.tasks.named import named
from distgrow.training.hooks import EndRun, EvaluationMade, Hook, HookPlace, KeepCheckpoint, RunBegun, RunEnded

Mode = Literal["min", "max"]
#: The name under which KeepBest keeps a checkpoint.
BEST = "best"


class _Watching(Hook):
    """Watch one metric."""

    def __init__(self, metric: str, mode: Mode, key: str) -> None:
        if not isinstance(metric, str) or not metric:
            raise ConfigError(f"{key}={metric!r} must be the name of a metric, such as loss")
        if mode not in ("min", "max"):
            raise ConfigError(f"{key}: mode={mode!r} must be min or max")
        self._metric, self._mode, self._key = metric, mode, key
        self._best: float | None = None

    @property
    def watches(self) -> tuple[str, str]:
        """Return the key of the config that names the metric, and the metric."""
        return self._key, self._metric

    def begin(self, run: RunBegun) -> None:
        """Check that there will be evaluations.

        Raises:
            ConfigError: There is no test set.
        """
        if not run.tests:
            raise ConfigError(
                f"{self._key}={self._metric} needs a test set, which the task has not: give one (fit: test=), or leave "
                f"{self._key} out"
            )

    def improves(self, evaluation: EvaluationMade, least: float = 0.0) -> bool:
        """Return whether the metric is better than the best one by more than `least`, and take it as the best.

        A metric that is not a number is never better.

        Raises:
            ConfigError: The evaluation has no such metric.
        """
        if self._metric not in evaluation.metrics:
            raise ConfigError(
                f"{self._key}={self._metric}: the evaluation has no such metric; it has "
                f"{', '.join(sorted(evaluation.metrics))}"
            )
        value = evaluation.metrics[self._metric]
        sign = 1 if self._mode == "min" else -1
        if math.isnan(value) or (self._best is not None and not sign * (self._best - value) > least):
            return False
        self._best = value
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {"best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._best = state["best"]


def watched(hooks: Iterable[Any]) -> list[tuple[str, str]]:
    """Return what those of the hooks watch that go by a metric: see `watches`."""
    return [hook.watches for hook in hooks if isinstance(hook, _Watching)]


class KeepBest(_Watching):
    """Keep the checkpoint of the best evaluation, beside the newest ones."""

    def __init__(self, metric: str = "loss", mode: Mode = "min") -> None:
        """Take the metric, and whether its least or its greatest value is best."""
        super().__init__(metric, mode, "run.keep.best")

    def after_eval(self, evaluation: EvaluationMade) -> KeepCheckpoint | None:
        """Ask for a checkpoint if the metric is better than ever."""
        return KeepCheckpoint(BEST) if self.improves(evaluation) else None


class EarlyStopping(_Watching):
    """End the run once a metric has not improved for some evaluations."""

    def __init__(self, metric: str = "loss", mode: Mode = "min", patience: int = 3, min_delta: float = 0.0) -> None:
        """Take the metric and when to give up.

        Args:
            metric: Name of a metric of the evaluations.
            mode: Whether less or more is better.
            patience: Evaluations in a row without an improvement, after which the run ends.
            min_delta: What counts as an improvement: more than this.
        """
        super().__init__(metric, mode, "run.early_stopping.metric")
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ConfigError(f"run.early_stopping.patience={patience!r} must be a whole number of at least 1")
        if not isinstance(min_delta, int | float) or not 0 <= min_delta < math.inf:
            raise ConfigError(f"run.early_stopping.min_delta={min_delta!r} must be a number of at least 0")
        self._patience, self._least, self._waited = patience, float(min_delta), 0

    def after_eval(self, evaluation: EvaluationMade) -> EndRun | None:
        """Ask for the end if patience is spent."""
        self._waited = 0 if self.improves(evaluation, self._least) else self._waited + 1
        if self._waited < self._patience:
            return None
        best = "never was a number" if self._best is None else f"is no better than {self._best:g}"
        return EndRun(f"early stopping: {self._metric} {best} for {counted(self._waited, 'evaluation')}")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and how long there was none better."""
        return {**super().state_dict(), "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state)
        self._waited = state["waited"]


class _Sampling(Hook):
    """Write what the model makes to RUN/samples.jsonl."""

    def __init__(self, sample: Callable[[nn.Module], Any] | str) -> None:
        """Take `sample(model)`, or its package.module:name.

        It returns anything that JSON can hold. Every rank calls it, in eval mode, with equal random generators.
        """
        name = type(self).__name__
        if isinstance(sample, str):
            sample = named(f"{name}.sample", sample)
        if not callable(sample):
            raise ConfigError(f"{name}: sample={sample!r} must be a function sample(model)")
        self._sample = sample

    def begin(self, run: RunBegun) -> None:
        """Remember the model and the file."""
        self._model, self._file = run.model, RunFolder(run.dir).samples
        self._writes = run.rank == 0

    def write(self, place: HookPlace) -> None:
        """Call the function, and write a line. The model's mode and the generators are the same afterwards."""
        training, device = self._model.training, next(self._model.parameters()).device
        self._model.eval()
        try:
            with torch.no_grad(), kept_generators(device), _uncompiled():
                seed_generators(place.samples, device)
                made = self._sample(self._model)
        finally:
            self._model.train(training)
        if self._writes:
            line = {"step": place.step, "samples": place.samples, "epoch": place.epoch, "made": made}
            _append(self._file, _line(type(self).__name__, line))


class LogSamples(_Sampling):
    """Write what the model makes, such as generated text, to RUN/samples.jsonl after every evaluation."""

    def begin(self, run: RunBegun) -> None:
        """Remember the model and the file.

        Raises:
            ConfigError: There is no test set, so there are no evaluations.
        """
        if not run.tests:
            raise ConfigError(
                "LogSamples goes by evaluations: it needs a test set, which the task has not: give one (fit: test=) "
                "or use SampleAtEnd"
            )
        super().begin(run)

    def after_eval(self, evaluation: EvaluationMade) -> None:
        """Call the function, and write a line."""
        self.write(evaluation)


class SampleAtEnd(_Sampling):
    """Write what the model makes, such as generated text, to RUN/samples.jsonl once the run is finished."""

    def end(self, run: RunEnded) -> None:
        """Call the function, and write a line, unless the run can be resumed."""
        if run.finished:
            self.write(run)


def _uncompiled() -> AbstractContextManager[Any]:
    """Let compiled models run as they are inside the context: a few rows of another shape are not worth compiling."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _line(hook: str, values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{hook}: sample(model) must return what JSON can hold: {error}") from None


def _append(file: Path, line: str) -> None:
    with storing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
