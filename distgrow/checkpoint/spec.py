"""When checkpoints are written, as a config says it."""

from distgrow.core.spec import PosFloat, PosInt, Spec


class Checkpointing(Spec):
    """When checkpoints are written. One is always written at the end and on SIGTERM."""

    every_s: PosFloat = 60.0
    """Seconds between two checkpoints, at most (the work that a crash can lose)."""
    every_steps: PosInt | None = None
    """Also every so many updates."""
    keep: PosInt = 3
    """How many to keep, the newest."""
