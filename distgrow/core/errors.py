"""Errors that users meet: each message gives the key, its value, what is allowed, and a fix."""


class ConfigError(ValueError):
    """Something asked for that cannot be: the message names the key, the value, what is allowed and the way out."""


class RunError(ConfigError):
    """Something that the user can put right keeps a run from starting or going on; nothing is lost."""


class TrainingFailed(Exception):
    """The training itself cannot go on; the last checkpoint is good."""


class Diverged(TrainingFailed):
    """Too many updates in a row were not finite, on every rank."""
