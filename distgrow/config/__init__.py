"""The whole YAML as one typed value, its overrides, and its errors for users."""

from distgrow.config.load import apply, load, parse
from distgrow.config.run import Run

__all__ = ["Run", "apply", "load", "parse"]
