"""The tasks of the SFO benchmark: what is trained, on what grids, to which targets."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sfo_contestants import POLICIES, Contestant, Policy, Scale
from sfo_names import as_stored
from sfo_quadratic import play_standard
from sfo_results import Course, Minima, Result, key_of
from sfo_runs import Places, play

from distgrow.config.load import parse
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError

Play = Callable[[Run, int, Course, float | None], tuple[int, str]]
"""(run, seed, course, ‖∇f‖ to stop at) → samples of an epoch, how the run ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Hold one task with its grids and targets."""

    name: str
    title: str
    about: str  #: for the tables: what it is
    scale: Scale
    play: Play
    grad_norms: Sequence[float]  #: targets of ‖∇f‖, falling
    held_losses: Sequence[float] = ()  #: targets of the held-out loss, falling
    base: Mapping[str, Any] = field(default_factory=dict)  #: task, optimizer, engine and run of a config
    arrives: bool = False  #: whether a run ends at the last target of ‖∇f‖
    random: bool = True  #: whether runs differ by seed
    policies: Sequence[Policy] = POLICIES

    def contestants(self) -> list[Contestant]:
        """Return all settings of all policies."""
        return [contestant for policy in self.policies for contestant in policy.contestants(self.scale)]

    @property
    def key(self) -> str:
        """Return a key of what all runs of the task share."""
        return key_of(self.name, self.base)

    def not_ready(self) -> str | None:
        """Return why its data cannot be read, or None if it can."""
        if "task" not in self.base:
            return None
        run = parse({**self.base, "growth": {"kind": "constant"}, "budget": {"steps": 1}})
        try:
            run.task.build(None)
        except ConfigError as error:
            return str(error)
        return None

    def run_key(self, contestant: Contestant, seed: int) -> str:
        """Return a key of everything that decides what a run computes."""
        return key_of(self.key, as_stored(contestant.values), seed)

    def own(self, results: Iterable[Result]) -> list[Result]:
        """Return the results that belong to one of today's settings."""
        made, found = self.contestants(), list(results)
        keys = {self.run_key(contestant, seed) for seed in {r.seed for r in found} for contestant in made}
        return [result for result in found if result.key in keys]

    @property
    def stop_at(self) -> float | None:
        """Return the ‖∇f‖ at which a run ends; None: it ends with its budget."""
        return self.grad_norms[-1] if self.arrives else None

    def course(self) -> Course:
        """Return an empty course with the targets."""
        return Course(grad_norm=Minima(targets=self.grad_norms), held_loss=Minima(targets=self.held_losses))


GRAD_NORMS = (0.1, 0.05, 0.02, 0.01)
PENALTY = 1e-3
#: Of softmax regression on the digits, bounds of the smoothness; ε = (0.01/L)², within which ‖∇f‖ is at most 0.01.
DIGITS = {"samples": 1437, "smoothness": 5.727, "largest_smoothness": 11.97, "mu": PENALTY, "optimum_sq": 6.343}


def quadratic() -> Problem:
    """(a) Exact moments."""
    return Problem(
        name="quadratic",
        title="The exact quadratic",
        about="64 directions of curvature 1 … 1/100, noise in proportion to curvature with tr Σ = 1, f(θ₀) = 1; E f "
        "and E‖∇f‖² in closed form, so there is no seed; an epoch stands for 1,024 samples",
        scale=Scale(
            batches=(8, 16, 32, 64, 128, 256, 512),
            lrs=(0.03, 0.05, 0.1, 0.3, 1.0),
            decay_batches=(4, 8, 32, 128),
            decay_lrs=(0.3, 1.0),
            starts=((4, 0.3), (8, 1.0), (32, 1.0)),
            cap=256,
            long=1000,
            open=200,
            budgets=(15, 30, 60),
            periods=(1, 2, 3, 5),
            auto_budgets=(1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48),
        ),
        play=play_standard,
        grad_norms=GRAD_NORMS,
        arrives=True,
        random=False,
    )


def digits() -> Problem:
    """(b) Softmax regression."""
    return Problem(
        name="digits",
        title="Softmax regression on digits, 20 % of the labels wrong",
        about="1,437 training samples, weight decay 1e-3 as a part of f; held-out loss by equally noisy labels, "
        "accuracy by the right ones, on 360 samples",
        scale=Scale(
            batches=(32, 64, 128, 256),
            lrs=(0.03, 0.05, 0.1, 0.2, 0.3),
            decay_batches=(8, 16, 32),
            decay_lrs=(0.25, 0.5, 1.0),
            starts=((8, 0.5), (8, 1.0), (32, 1.0)),
            cap=128,
            long=400,
            open=60,
            budgets=(10, 20, 40),
            periods=(1, 2, 3, 4),
            auto_budgets=(1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48),
            constants={**DIGITS, "epsilon": (GRAD_NORMS[-1] / DIGITS["smoothness"]) ** 2},
        ),
        play=partial(play, places=Places(first=0.125, wider=0.005)),
        grad_norms=GRAD_NORMS,
        held_losses=(1.3, 1.25, 1.2),
        base={
            "task": {"kind": "target", "target": "sfo_tasks:noisy_digits"},
            "optimizer": {"kind": "sgd", "weight_decay": PENALTY},
            "engine": {"kind": "torch", "max_micro": 2048, "device": "cpu"},
            "run": {"eval": {"rows": 2048}},
        },
        arrives=True,
    )


def cifar10(data: str, subset: int, epochs: float, looks: int = 12) -> Problem:
    """(c) A ResNet-8, looked at so often."""
    held_out = min(2000, subset)
    return Problem(
        name="cifar10",
        title="ResNet-8 on CIFAR-10",
        about=f"GroupNorm, the first {subset:,} training images, shifted and mirrored, {held_out:,} test images, plain "
        f"SGD; every run has {epochs:g} epochs of gradient evaluations",
        scale=fixed_budget(epochs, batches=(16, 64), lrs=(0.05, 0.2), cap=min(1024, subset // 4)),
        play=partial(play, places=Places(first=epochs / looks)),
        grad_norms=(0.5, 0.3, 0.2),
        held_losses=(1.7, 1.6, 1.5, 1.4),
        base={
            "task": {
                "kind": "target",
                "target": "sfo_tasks:cifar",
                "args": {"path": data, "subset": subset, "held_out": held_out},
            },
            "engine": {"kind": "torch", "max_micro": 256},
        },
    )


def text(
    samples: int = 2048, epochs: float = 4.0, length: int = 64, layers: int = 4, width: int = 128, looks: int = 12
) -> Problem:
    """(d) A small GPT, looked at so often."""
    size = {"length": length, "layers": layers, "width": width, "heads": 4}
    cap = min(512, samples // 4)
    return Problem(
        name="text",
        title="A small GPT on text",
        about=f"{layers} layers of width {width}, {samples:,} windows of {length} bytes of Python's standard library, "
        f"AdamW; every run has {epochs:g} epochs of gradient evaluations",
        scale=replace(fixed_budget(epochs, batches=(16, 64), lrs=(1e-3, 3e-3), cap=cap), power=0.5),
        play=partial(play, places=Places(first=epochs / looks)),
        grad_norms=(0.5, 0.3, 0.2),
        held_losses=(2.4, 2.2, 2.0),
        base={
            "task": {
                "kind": "target",
                "target": "sfo_tasks:text",
                "args": {"path": None, "samples": samples, "held_out": min(512, samples), **size},
            },
            "optimizer": {"kind": "adamw", "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0},
            "engine": {"kind": "torch", "max_micro": 64},
        },
    )


def fixed_budget(epochs: float, *, batches: Sequence[int], lrs: Sequence[float], cap: int) -> Scale:
    """Grids where every run has the same budget, as deep nets need it; decays and stages share it out."""
    return Scale(
        batches=batches,
        lrs=lrs,
        decay_batches=batches,
        decay_lrs=lrs,
        starts=[(batch, lr) for batch in batches for lr in lrs],
        cap=cap,
        long=epochs,
        open=epochs,
        budgets=(epochs,),
        periods=(epochs / 7,),
        auto_budgets=(epochs,),
    )
