"""Branches of a checkpoint: which batches they get, and which batch is the critical one. Trains none of them.

Merrill et al. 2025 (arXiv 2505.23971): from one checkpoint, train on the same samples with k times the batch and f(k)
times the learning rate; the largest k whose loss is then no worse than that of any smaller one is the critical batch.
f(k) is k for SGD and √k for Adam-like optimizers. The run itself is not touched.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, InstanceOf

from distgrow.checkpoint.storage import NAME, Folder
from distgrow.config.load import load
from distgrow.config.run import Run
from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError, RunError
from distgrow.core.lr import LR, NoDecay, Span
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat
from distgrow.growth.constant import Constant
from distgrow.growth.controller import Controller
from distgrow.optim import OptimizerSpec
from distgrow.run.folder import RunFolder

#: Default length of a branch, in updates of the run's own batch. About the length in the paper.
UPDATES = 500
#: Fewest updates that the branch with the largest batch may have.
LEAST = 8
#: Default of the largest k.
MOST = 16
Scaling = Literal["auto", "linear", "sqrt", "constant"]


class Branch(Constant):
    """Hold the growth of a branch: a constant batch of `start` samples, and the run's learning rate times `gain`."""

    trunk: InstanceOf[Controller] = Field(exclude=True)
    """The run's schedule."""
    gain: PosFloat
    """f(k), the factor of the learning rate."""

    @property
    def first_batch(self) -> int:
        """Return the run's b₀."""
        return self.trunk.growth.first_batch

    def rate_growth(self, lr: LR, progress: Progress, batch: int) -> float:
        """Return by how much the learning rate has followed the batch in the run, times f(k)."""
        at = self.trunk.growth.stage_batch(progress.stage)
        return self.gain * self.trunk.growth.rate_growth(lr, progress, at)

    def multiplier(self, lr: LR, progress: Progress, batch: int, span: Span) -> float:
        """Return η/η₀: the run's own at this number of samples and at the stage of its checkpoint, times f(k)."""
        return self.gain * self.trunk.rate(progress, self.trunk.growth.stage_batch(progress.stage)) / lr.initial


def lr_factor(rule: Scaling, optimizer: OptimizerSpec, k: int) -> float:
    """Return f(k), the factor of the learning rate when the batch is multiplied by k."""
    if rule == "auto":
        rule = optimizer.scaling
    return {"linear": float(k), "sqrt": math.sqrt(k), "constant": 1.0}[rule]


# ── the checkpoint ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk:
    """Hold the run whose checkpoint is branched, and that checkpoint."""

    folder: RunFolder
    run: Run
    checkpoint: Path
    progress: Progress
    damaged: tuple[str, ...] = ()  #: newer checkpoints, which were passed over, and what is wrong with each

    @property
    def batch(self) -> int:
        """Return the run's batch at the stage of the checkpoint, in samples."""
        return self.run.growth.stage_batch(self.progress.stage)


def find_checkpoint(path: str) -> Trunk:
    """Return the checkpoint at RUN/checkpoints/step-…, or the newest intact one of the folder RUN.

    Raises:
        ConfigError: if there is none, or if its run cannot be built again.
        RunError: if it is damaged.
    """
    from distgrow.checkpoint import writer  # loads torch

    place = Path(path).absolute()
    if place.is_file():
        raise ConfigError(f"{path} is a file; give the folder of a run{_run_of(place)}, or one of its checkpoints")
    if not place.is_dir():
        raise ConfigError(f"{path}: there is no such folder; give RUN/checkpoints/step-…, or RUN for its newest")
    whole = (place / "config.yaml").is_file()
    folder = RunFolder(place if whole else place.parent.parent)
    named = NAME.fullmatch(place.name) and place.parent == folder.checkpoints
    if not whole and not (named and folder.begun()):
        raise ConfigError(f"{path} is neither a run's folder nor one of its checkpoints, RUN/checkpoints/step-…")
    run, damaged = _config(folder), list[str]()
    if whole:
        name, _, damaged = writer.newest(Folder(folder.checkpoints))
        place = folder.checkpoints / name
    elif damage := writer.check(place):
        raise RunError(f"{path} is damaged: {damage}; choose another checkpoint, or {folder.path} for its newest")
    progress = replace(Progress.from_dict(json.loads((place / "progress.json").read_text())), ended=None)
    return Trunk(folder=folder, run=run, checkpoint=place, progress=progress, damaged=tuple(damaged))


def _run_of(file: Path) -> str:
    """Return the run.dir that a config names, for a message; nothing if the file is no config."""
    try:
        return f", {load(file).run.dir}, once 'distgrow train {file.name}' has begun it"
    except ConfigError:
        return ""


def _config(folder: RunFolder) -> Run:
    if "\ntask:" not in f"\n{folder.config.read_text(encoding='utf-8')}":
        raise ConfigError(
            f"{folder.config} has no task: the run was started by fit(), and only its own program can build it again; "
            "start it with 'distgrow train' and task.kind=target to branch it"
        )
    run = load(folder.config)
    epoch = run.task.train_size()
    span = Span(samples=run.budget.total(epoch) or 0, epoch=epoch)
    return run.model_copy(update={"growth": run.growth.for_run(span)})


# ── the options ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """Hold the options of `distgrow probe-batch`. Where None, `resolve` computes the value."""

    samples: int | None = None  #: of each branch
    up_to: int | None = None  #: the largest k; k = 1, 2, 4 … up to it
    rule: Scaling = "auto"
    tolerance: float = 0.01  #: loss
    out: str | None = None  #: folder for the results; if None, the run's


def resolve(options: ProbeOptions, trunk: Trunk, epoch: int, left: float) -> tuple[int, list[int]]:
    """Return the samples of each branch, and every k.

    Args:
        options: What the user gave.
        trunk: The checkpoint.
        epoch: Samples of the training set.
        left: Samples until the run's learning rate has decayed.

    Raises:
        ConfigError: if such branches cannot be trained.
    """
    batch = trunk.batch
    samples = options.samples if options.samples is not None else int(min(UPDATES * batch, left))
    most = options.up_to or min(MOST, max(1, epoch // batch), max(1, samples // (LEAST * batch)))
    powers = [2**power for power in range(most.bit_length())]
    if options.up_to is not None and powers[-1] != options.up_to:
        raise ConfigError(f"--up-to {most}: k is 1, 2, 4 …; give {powers[-1]} or {2 * powers[-1]}")
    if options.samples is None and left < LEAST * batch:
        raise ConfigError(
            f"the learning rate's decay ends {int(left)} samples after {trunk.checkpoint.name}, too few for branches; "
            "choose an earlier checkpoint"
        )
    if len(powers) < 2:
        raise ConfigError(
            f"there is nothing to compare: twice the batch of {batch} needs {2 * batch} of the training set's {epoch} "
            f"samples and {2 * LEAST * batch} samples of each branch; choose an earlier checkpoint, more --samples, or "
            "--up-to 2 or more"
        )
    top = powers[-1] * batch
    if top > epoch:
        raise ConfigError(f"--up-to {most}: batch {top} exceeds the {epoch} samples of the training set; lower it")
    if samples < LEAST * top:
        raise ConfigError(
            f"--samples {samples}: the branch with batch {top} would make {counted(samples // top, 'update')}, fewer "
            f"than {LEAST}; give at least {LEAST * top}, or a smaller --up-to"
        )
    if samples > left:
        raise ConfigError(
            f"--samples {samples}: the learning rate's decay ends {int(left)} samples after {trunk.checkpoint.name}; "
            "take fewer, or an earlier checkpoint"
        )
    return samples, powers


def samples_left(trunk: Trunk, controller: Controller) -> float:
    """Return the samples until the run's learning rate has decayed, or inf if it does not decay."""
    if isinstance(trunk.run.lr.decay, NoDecay):
        return math.inf
    return max(0, controller.samples() - trunk.progress.ledger.applied)
