"""Whatever the losses of a run are, what-if has finite numbers for it or refuses it, and a report is written."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from distgrow import budget, fit, late
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR
from distgrow.planning.what_if.outlook import SHOWN, Outlook, foresee_more, what_if
from distgrow.report.runs import Record, read
from distgrow.report.write import write
from distgrow.tasks.builtin import Digits
from distgrow.training.spec import RunSpec

Array = NDArray[np.float64]
UPDATES, EPOCH = 400, 800
SHARES = np.arange(1, UPDATES + 1) / UPDATES  #: of the run


def record(folder: Path, losses: Array, decayed: float = 1.0, optimizer: str = "sgd") -> Record:
    """A run at batch 8 whose rate falls at half of it."""
    lines: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, start=1):
        place = {"step": step, "samples": 8 * step, "time_s": 0.01 * step, "sfo": 8 * step, "epoch": 8 * step / EPOCH}
        shape = {"stage": 0, "batch": 8, "lr": 0.3 if step <= UPDATES / 2 else 0.3 * decayed, "world": 1}
        rest = {"loss": float(loss) if math.isfinite(loss) else None, "grad_norm": None, "samples_per_s": 1e3}
        lines.append({"event": "step", **place, **shape, **rest})
    lines.append({"event": "end", "step": UPDATES, "samples": 8 * UPDATES, "time_s": 9.0, "reason": "done"})
    folder.mkdir(parents=True)
    growth, rate = {"kind": "constant", "start": 8}, {"base": 0.3}
    config = {"growth": growth, "lr": rate, "stages": {}, "budget": {"samples": 8 * UPDATES}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "optimizer": {"kind": optimizer}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read([str(folder)])[0]


def finite(found: Outlook) -> bool:
    numbers = [number for each in found.prospects for number in (each.loss, each.low, each.high)]
    return bool(numbers) and all(map(math.isfinite, numbers))


#: Losses that fall faster than a power of the time for a while, as those of a net that learns its training set do.
FAST: dict[str, Callable[[float], Array]] = {
    "exponential": lambda speed: np.exp(-speed * SHARES),
    "cliff": lambda speed: 1 / (1 + np.exp(4 * speed * (SHARES - 0.6))),
    "line to 0": lambda speed: (1.02 - SHARES) ** (speed / 10),
}


@pytest.mark.parametrize("shape", FAST)
@pytest.mark.parametrize(
    ("speed", "decayed", "optimizer"), [(10.0, 1.0, "sgd"), (20.0, 0.01, "sgd"), (20.0, 1.0, "adamw")]
)
def test_losses_that_fall_fast_are_foreseen(
    shape: str, speed: float, decayed: float, optimizer: str, tmp_path: Path
) -> None:
    """The solver tries powers of the time that overflow, and goes back."""
    own = record(tmp_path / "run", FAST[shape](speed) + 0.01, decayed, optimizer)
    assert finite(what_if(own))


def test_a_net_that_has_learned_the_digits_is_foreseen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, run = Digits().build(None), str(tmp_path / "run")
    fit(
        task.model, task.loss, task.train, growth=late(16, 256), budget=budget(epochs=20), lr=LR(base=0.1),
        run=RunSpec(dir=run),
    )  # fmt: skip
    (own,) = read([run])
    assert finite(what_if(own))
    planned = foresee_more(own)
    assert planned is not None
    assert len(planned.prospects) == SHOWN


ODD: dict[str, Array] = {
    "zero": np.zeros(UPDATES),
    "to zero": np.maximum(0.0, 0.9 - SHARES),
    "below zero": -SHARES,
    "through zero": 1 - 2 * SHARES,
    "constant": np.ones(UPDATES),
    "rising": SHARES,
    "exploding": np.exp(300 * SHARES),
    "huge": 1e100 / SHARES,
    "tiny": 1e-300 / SHARES,
    "vanishing": np.exp(-700 * SHARES),
    "two values": np.where(np.arange(UPDATES) % 2, 1.0, 1e-9),
    "a spike": np.where(np.arange(UPDATES) == UPDATES - 3, 1e100, 1.0),
    "not finite at times": np.where(np.arange(UPDATES) % 3, 1 / SHARES, np.nan),
}


@pytest.mark.parametrize("losses", ODD.values(), ids=ODD)
@pytest.mark.parametrize("decayed", [1.0, 1e-9])
def test_odd_losses_are_foreseen_or_refused_and_have_a_report(losses: Array, decayed: float, tmp_path: Path) -> None:
    own = record(tmp_path / "run", losses, decayed)
    with suppress(ConfigError):
        assert finite(what_if(own))
    write([str(tmp_path / "run")], str(tmp_path), foresee_more)
    assert (tmp_path / "report.html").is_file()


def test_losses_that_are_not_above_0_are_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run: its training loss comes to -0.9.*above 0; give a --metric"):
        what_if(record(tmp_path / "run", -SHARES))
