"""When checkpoints are written, as a config says it."""

from distgrow.core.errors import ConfigError
from distgrow.core.spec import PosFloat, PosInt, Spec
from distgrow.core.stages import interval


class Checkpointing(Spec):
    """When checkpoints are written. One is always written at the end and on SIGTERM."""

    every_s: PosFloat = 60.0
    """Seconds between two checkpoints, at most (the work that a crash can lose)."""
    every_steps: PosInt | None = None
    """Also every so many updates."""
    every_samples: PosInt | None = None
    """Also every so many samples."""
    every_tokens: PosInt | None = None
    """Also every so many tokens, if every sample has as many."""
    keep: PosInt = 3
    """How many to keep, the newest."""

    def in_samples(self, tokens: int | None) -> "Checkpointing":
        """Return the interval in samples, if it is in tokens, of which every sample has `tokens`.

        Raises:
            ConfigError: That is not known, or both are given.
        """
        if self.every_tokens is None:
            return self
        if self.every_samples is not None:
            raise ConfigError("run.checkpoint: every_samples and every_tokens are given; leave one")
        every = interval(self.every_tokens, tokens, "run.checkpoint.every_tokens")
        return self.model_copy(update={"every_tokens": None, "every_samples": every})
