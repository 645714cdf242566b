"""What is known of lr.base=auto before it is measured: where short runs begin, how long they are, what is recorded."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.rate_test import MOST_RATES, RateTest, first_updates
from distgrow.core.yaml_text import plain, read_file
from distgrow.run.folder import RunFolder
from distgrow.training.settings import Settings


def first_rate(settings: Settings) -> float:
    """Return the rate that short runs begin with: lr.base, or lr.test.start if it is auto."""
    test = settings.lr.test or RateTest()
    if not settings.lr.unknown:
        return settings.lr.initial
    return test.start or (0.1 if settings.optimizer.scaling == "linear" else 0.001)


def updates_of(settings: Settings, epoch: int) -> int:
    """Return the updates of each short run that measures lr.base=auto."""
    batch, total = settings.growth.start, settings.budget.total(epoch)
    samples = (settings.budget.steps or 0) * batch if total is None else total
    return (settings.lr.test or RateTest()).length(samples, batch)


def most_evaluations(settings: Settings, epoch: int) -> int:
    """Return the gradient evaluations that measuring lr.base=auto takes at most.

    Raises:
        ConfigError: A budget of gradient evaluations has no more.
    """
    updates, sfo = updates_of(settings, epoch), settings.budget.sfo
    most = (MOST_RATES * updates + first_updates(settings.growth.start)) * settings.growth.start
    if sfo is not None and most >= sfo:
        raise ConfigError(
            f"budget.sfo={sfo}: measuring lr.base=auto may take {MOST_RATES} short runs of "
            f"{counted(str(updates), 'update')}, {most} gradient evaluations; raise it, lower lr.test.updates, or give "
            "lr.base a number"
        )
    return most


def recorded_rate(folder: RunFolder) -> float | None:
    """Return the rate that the run in a folder has measured; None: it has not, or there is none."""
    lr: Any = None
    if folder.begun():
        with suppress(ConfigError):  # a damaged file, which `reopen` tells
            values = plain(read_file(folder.config))
            lr = values.get("lr") if isinstance(values, Mapping) else None
    rate = lr.get("measured") if isinstance(lr, Mapping) else None
    return float(rate) if isinstance(rate, int | float) and 0 < rate < math.inf else None
