"""Where a run is kept and what it does beside training, as a config says it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.errors import ConfigError
from distgrow.core.noise_stats import Measuring
from distgrow.core.probe_schedule import Probing
from distgrow.core.spec import PosFloat, PosInt, Spec
from distgrow.core.stages import interval
from distgrow.data.spec import Loading
from distgrow.distributed.environment import expanded
from distgrow.run.stop import StopSignal
from distgrow.tracking.spec import TrackerSpecs


class Evaluation(Spec):
    """When the test set is evaluated: every so many epochs, samples or steps, and always at the end."""

    every_epochs: PosFloat | None = None
    """Epochs between two evaluations. The default is 1, unless `every_samples` or `every_steps` is given."""
    every_samples: PosInt | None = None
    """Samples between two evaluations."""
    every_tokens: PosInt | None = None
    """Tokens between two evaluations, if every sample has as many."""
    every_steps: PosInt | None = None
    """Updates between two evaluations."""
    rows: PosInt = 256
    """Rows of an evaluation batch."""

    @model_validator(mode="after")
    def _at_most_one_unit(self) -> "Evaluation":
        units = ("every_epochs", "every_samples", "every_tokens", "every_steps")
        given = [unit for unit in units if getattr(self, unit) is not None]
        if len(given) > 1:
            raise ConfigError(f"run.eval: {' and '.join(given)} are given; leave one")
        return self

    def in_samples(self, tokens: int | None) -> "Evaluation":
        """Return the interval in samples, if it is in tokens, of which every sample has `tokens`.

        Raises:
            ConfigError: That is not known.
        """
        if self.every_tokens is None:
            return self
        every = interval(self.every_tokens, tokens, "run.eval.every_tokens")
        return self.model_copy(update={"every_tokens": None, "every_samples": every})

    def crossed(self, before: tuple[int, int], now: tuple[int, int], epoch: int) -> bool:
        """Return whether a multiple of the interval lies in (before, now], both of them (step, samples).

        Args:
            before: The last evaluation.
            now: The run.
            epoch: Samples of an epoch.
        """
        if self.every_steps is not None:
            return before[0] // self.every_steps != now[0] // self.every_steps
        every = self.every_samples or (self.every_epochs or 1.0) * epoch
        return before[1] // every != now[1] // every


class KeepSpec(Spec):
    """Which checkpoint is kept beside the newest ones."""

    best: Annotated[str, Field(min_length=1)]
    """The metric of the evaluations by which a checkpoint is best, such as loss or average/loss."""
    mode: Literal["min", "max"] = "min"
    """Whether the least or the greatest value is best."""


class EarlyStoppingSpec(Spec):
    """When a run ends before its budget."""

    metric: Annotated[str, Field(min_length=1)] = "loss"
    """The metric of the evaluations that must improve."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""
    patience: PosInt = 3
    """Evaluations in a row without an improvement, after which the run ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as an improvement: more than this."""


class HookSpec(Spec):
    """A hook of one's own."""

    target: Annotated[str, Field(min_length=1)]
    """package.module:Class, or a function that returns a hook."""
    args: dict[str, Any] = {}
    """Keyword arguments for it."""


def _by_name(given: Any) -> Any:
    return {"target": given} if isinstance(given, str) else given


class RunSpec(Spec):
    """Where a run is kept, and its habits."""

    dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$"), AfterValidator(expanded)] = "runs/run"
    """The run's folder. ~ and $NAMES of the environment are replaced, {name} by the name of the config's file, else by
    the task's kind, and {n} by a number that counts up with every new run: runs/{name}-{n}."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of parameters, data order, augmentation and dropout."""
    checkpoint: Checkpointing = Checkpointing()
    """When checkpoints are written."""
    eval: Evaluation = Evaluation()
    """When the test set is evaluated."""
    keep: KeepSpec | None = None
    """Keep the checkpoint of the best evaluation, too: {best: loss, mode: min}. Default: the newest ones alone."""
    early_stopping: EarlyStoppingSpec | None = None
    """End the run once the evaluations do not improve any more: {metric: loss, patience: 3}. Default: it never does."""
    hooks: list[Annotated[HookSpec, BeforeValidator(_by_name)]] = []
    """Hooks of your own: [package.module:Class], or [{target: …, args: {…}}]."""
    probe: Probing = Probing()
    """When the full gradient is measured exactly."""
    loader: Loading = Loading()
    """How samples are loaded."""
    noise: Measuring = Measuring()
    """How gradient noise is measured."""
    peak_flops: PosFloat | None = None
    """FLOP/s of one rank's device at its best, for the share of them that a language model takes: `mfu`. Default: those
    of the GPU, if its name is known."""
    trackers: TrackerSpecs = []
    """Services to report to, beside metrics.jsonl: wandb, mlflow."""
    log_every: PosInt = 1
    """Updates between two step lines of metrics.jsonl."""
    log_every_samples: PosInt | None = None
    """Samples between two step lines, in place of updates."""
    log_every_epochs: PosFloat | None = None
    """Epochs between two step lines, in place of updates."""
    stop_signals: list[StopSignal] = ["SIGTERM", "SIGINT"]
    """Signals after which the run writes a checkpoint and ends. SIGINT is Ctrl-C; a second one ends the run at once.
    SLURM sends the signal of `sbatch --signal`, often SIGUSR1."""
    max_skips: PosInt = 20
    """Non-finite updates in a row after which the run stops."""

    @model_validator(mode="after")
    def _log_by_one_unit(self) -> "RunSpec":
        if self.log_every_samples is not None and self.log_every_epochs is not None:
            raise ConfigError("run.log_every_samples and run.log_every_epochs are given; leave one")
        return self

    def in_samples(self, tokens: int | None) -> "RunSpec":
        """Return the intervals in samples, if they are in tokens, of which every sample has `tokens`.

        Raises:
            ConfigError: That is not known.
        """
        changed = {"eval": self.eval.in_samples(tokens), "checkpoint": self.checkpoint.in_samples(tokens)}
        return self.model_copy(update=changed)

    def logs(self, before: tuple[int, int], now: tuple[int, int], epoch: int) -> bool:
        """Return whether the update from `before` to `now`, both of them (step, samples), is logged.

        Args:
            before: The run before the update.
            now: The run after it.
            epoch: Samples of an epoch.
        """
        if self.log_every_samples is None and self.log_every_epochs is None:
            return now[0] % self.log_every == 0
        every = self.log_every_samples or (self.log_every_epochs or 1.0) * epoch
        return before[1] // every != now[1] // every
