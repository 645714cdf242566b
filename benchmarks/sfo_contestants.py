"""Who takes part in the SFO benchmark: policies and the grids of their settings, as parts of a config."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from distgrow.config.load import parse
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError

Values = dict[str, Any]
OFTEN: Values = {"run": {"noise": {"every": 1}}}  #: of policies that measure, as every update shows something here


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The grids on one task. Budgets and periods are in epochs."""

    batches: Sequence[int]  #: of constant batches
    lrs: Sequence[float]  #: of constant batches
    decay_batches: Sequence[int]  #: of decaying learning rates
    decay_lrs: Sequence[float]  #: what those decay from
    starts: Sequence[tuple[int, float]]  #: (b₀, η₀) that growth begins with
    cap: int  #: of growth
    long: float  #: budget of constant batches
    open: float  #: budget of schedules that know no end
    budgets: Sequence[float]  #: of schedules that are cut to their budget
    periods: Sequence[float]  #: from one decay, or stage, to the next
    auto_budgets: Sequence[float]  #: budgets of the default policy
    halvings: int = 16  #: periods after which a learning rate has decayed to nothing
    power: float = 1.0  #: p of the temperature η/b^p that the optimizer feels
    constants: Mapping[str, Any] = field(default_factory=dict)  #: of a strongly convex sum, where they are known


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One setting of a policy."""

    policy: str
    setting: str
    values: Mapping[str, Any]  #: growth, stages, lr and budget of a config

    def config(self, base: Mapping[str, Any]) -> Values:
        """Return the whole config. `base` holds the task's parts."""
        return {**base, **self.values, "run": {**base.get("run", {}), **self.values.get("run", {})}}

    def run(self, base: Mapping[str, Any]) -> Run:
        """Return the run on such a task. Raise Unavailable if this version cannot run it."""
        try:
            return parse(self.config(base))
        except ConfigError as error:
            raise Unavailable(self.reason(str(error))) from None

    def reason(self, message: str) -> str:
        """Return briefly why it does not take part."""
        unknown = f"growth.kind={self.values['growth']['kind']!r}: unknown" in message
        return "not available" if unknown else f"refused: {message.splitlines()[0]}"


class Unavailable(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy and its grid on a task of some scale."""

    name: str
    grid: Callable[[Scale], Iterator[tuple[str, Values]]]
    family: str = "growth"  #: constant, decay or growth
    published: str = ""  #: what a paper reports of it
    tuned: bool = True  #: whether its settings are a grid, of which the best are run with more seeds

    def contestants(self, scale: Scale) -> list[Contestant]:
        """Return all settings."""
        return [Contestant(policy=self.name, setting=name, values=values) for name, values in self.grid(scale)]


# ── baselines ───────────────────────────────────────────────────────────────────────────────────────────────────


def parts(
    growth: Values, lr: float, epochs: float, rule: str | None = "constant", *, decay: Values | None = None
) -> Values:
    rate: Values = {"base": lr} | ({"rule": {"kind": rule}} if rule else {}) | ({"decay": decay} if decay else {})
    return {"growth": growth, "lr": rate, "budget": {"epochs": float(epochs)}}


def constant(scale: Scale) -> Iterator[tuple[str, Values]]:
    """b and η throughout."""
    for batch, lr in product(scale.batches, scale.lrs):
        yield f"b={batch} η={lr:g}", parts({"kind": "constant", "start": batch}, lr, scale.long)


def _decayed(scale: Scale) -> Iterator[tuple[str, Values, float]]:
    for batch, lr in product(scale.decay_batches, scale.decay_lrs):
        yield f"b={batch} η={lr:g}", {"kind": "constant", "start": batch}, lr


def _halved(period: float) -> Values:
    return {"kind": "step", "every": {"epochs": float(period)}, "factor": 0.5}


def step_decay(scale: Scale) -> Iterator[tuple[str, Values]]:
    """η halved once a period."""
    for (name, growth, lr), period in product(_decayed(scale), scale.periods):
        budget = min(scale.long, scale.halvings * period)
        yield f"{name}, η/2 every {period:g}", parts(growth, lr, budget, decay=_halved(period))


def cosine_decay(scale: Scale) -> Iterator[tuple[str, Values]]:
    """η along half a cosine over the budget."""
    for (name, growth, lr), budget in product(_decayed(scale), scale.budgets):
        yield f"{name}, {budget:g} epochs", parts(growth, lr, budget, decay={"kind": "cosine"})


def wsd(scale: Scale) -> Iterator[tuple[str, Values]]:
    """η held, then linearly down to nothing over the second half of the budget."""
    for (name, growth, lr), budget in product(_decayed(scale), scale.budgets):
        decay = {"kind": "wsd", "decay": 0.5}
        yield f"{name}, {budget:g} epochs", parts(growth, lr, budget, decay=decay)


# ── growth by the clock ─────────────────────────────────────────────────────────────────────────────────────────


def _start(start: int, lr: float) -> str:
    return f"b₀={start} η₀={lr:g}"


def _stages(period: float) -> Values:
    return {"stages": {"every": {"epochs": float(period)}}}


def linear(scale: Scale) -> Iterator[tuple[str, Values]]:
    """b₀ more a period."""
    for (start, lr), period in product(scale.starts, scale.periods):
        growth = {"kind": "linear", "start": start, "increment": start, "cap": scale.cap}
        name = f"{_start(start, lr)}, +b₀ every {period:g}"
        yield name, parts(growth, lr, scale.open) | _stages(period)


def exponential(scale: Scale) -> Iterator[tuple[str, Values]]:
    """b doubled once a period, η constant or with √b."""
    for (start, lr), period, rule in product(scale.starts, scale.periods, ("constant", "sqrt")):
        growth = {"kind": "exponential", "start": start, "cap": scale.cap}
        name = f"{_start(start, lr)}, ×2 every {period:g}{', √' if rule == 'sqrt' else ''}"
        yield name, parts(growth, lr, scale.open, rule) | _stages(period)


def optimal(scale: Scale) -> Iterator[tuple[str, Values]]:
    """Stages as long as is optimal for η ∝ √b."""
    for (start, lr), budget in product(scale.starts, scale.budgets):
        growth = {"kind": "optimal", "start": start, "cap": scale.cap}
        yield f"{_start(start, lr)}, {budget:g} epochs", parts(growth, lr, budget, "sqrt")


def replacing(kind: str) -> Callable[[Scale], Iterator[tuple[str, Values]]]:
    """Growth in the place of a step decay, and of a cosine."""

    def grid(scale: Scale) -> Iterator[tuple[str, Values]]:
        for start, lr in scale.starts:
            growth = {"kind": kind, "start": start, "cap": scale.cap}
            for period in scale.periods:
                budget = min(scale.long, scale.halvings * period)
                name = f"{_start(start, lr)}, for η/2 every {period:g}"
                yield name, parts(growth, lr, budget, None, decay=_halved(period))
            for budget in scale.budgets:
                name = f"{_start(start, lr)}, for a cosine of {budget:g} epochs"
                yield name, parts(growth, lr, budget, None, decay={"kind": "cosine"})

    return grid


# ── growth that measures, or that a budget shapes ───────────────────────────────────────────────────────────────


def _growing(kind: str, scale: Scale, **own: Any) -> Iterator[tuple[str, Values, float]]:
    for start, lr in scale.starts:
        yield _start(start, lr), {"kind": kind, "start": start, "cap": scale.cap, **own}, lr


def budgeted(kind: str) -> Callable[[Scale], Iterator[tuple[str, Values]]]:
    """A kind that is cut to its budget, with its defaults."""

    def grid(scale: Scale) -> Iterator[tuple[str, Values]]:
        for (name, growth, lr), budget in product(_growing(kind, scale), scale.budgets):
            yield f"{name}, {budget:g} epochs", parts(growth, lr, budget, None)

    return grid


def measuring(kind: str, **choices: Sequence[Any]) -> Callable[[Scale], Iterator[tuple[str, Values]]]:
    """A kind that needs no end, and measures at every update; its settings are the n-th of each of the `choices`."""

    def grid(scale: Scale) -> Iterator[tuple[str, Values]]:
        for values in zip(*choices.values(), strict=True) if choices else [()]:
            own = dict(zip(choices, values, strict=True))
            shown = "".join(f", {key}={value}" for key, value in own.items())
            for name, growth, lr in _growing(kind, scale, **own):
                yield name + shown, parts(growth, lr, scale.open, None) | OFTEN

    return grid


def auto(scale: Scale) -> Iterator[tuple[str, Values]]:
    """The default policy as it is, at several budgets; only η₀, which every user has to give, is one of two."""
    for lr, budget in product(sorted({lr for _, lr in scale.starts}, reverse=True), scale.auto_budgets):
        yield f"η₀={lr:g}, {budget:g} epochs", parts({"kind": "auto"}, lr, budget, None)


def temperature(scale: Scale) -> Iterator[tuple[str, Values]]:
    """T = η/b^p down a step decay, a cosine, or at plateaus of the loss, η as large as at the beginning."""
    for name, growth, lr in _growing("temperature", scale, power=scale.power):
        for period in scale.periods:
            budget = min(scale.open, scale.halvings * period)
            yield f"{name}, T/2 every {period:g}", parts(growth, lr, budget, None, decay=_halved(period))
        for budget in scale.budgets:
            yield f"{name}, cosine of {budget:g} epochs", parts(growth, lr, budget, None, decay={"kind": "cosine"})
        plateau = {"plateau": {"epochs": float(min(1.0, scale.periods[0]))}}
        yield f"{name}, at plateaus", parts(growth | plateau, lr, scale.open, None)


def adascale(scale: Scale) -> Iterator[tuple[str, Values]]:
    """s times the batch that η is meant for, η times the gain g, halved once a period; an update counts for g steps."""
    for (start, lr), times, period in product(scale.starts, (4, 16), scale.periods):
        growth = {"kind": "adascale", "start": start, "scale": times, "power": scale.power}
        name = f"{_start(start, lr)}, s={times}, η/2 every {period:g}"
        yield name, parts(growth, lr, scale.open, None, decay=_halved(period)) | OFTEN


def tau_nice(scale: Scale) -> Iterator[tuple[str, Values]]:
    """The best constant batch of a strongly convex sum whose constants are known."""
    for lr in scale.lrs if scale.constants else ():
        yield f"η={lr:g}", parts({"kind": "tau_nice", **scale.constants}, lr, scale.long)


POLICIES = (
    Policy(name="constant", grid=constant, family="constant"),
    Policy(name="step decay", grid=step_decay, family="decay"),
    Policy(name="cosine decay", grid=cosine_decay, family="decay"),
    Policy(name="WSD", grid=wsd, family="decay"),
    Policy(name="linear", grid=linear),
    Policy(name="exponential", grid=exponential),
    Policy(name="optimal", grid=optimal),
    Policy(name="increase", grid=replacing("increase")),
    Policy(name="seesaw", grid=replacing("seesaw")),
    Policy(name="late", grid=budgeted("late")),
    Policy(name="temperature", grid=temperature),
    Policy(
        name="norm_threshold",
        grid=measuring(
            "norm_threshold",
            threshold=("published", "published", "critical", "critical"),
            norm=("exact", "exact", "exact", "estimated"),
            every=(1000, 100, 100, 100),
        ),
    ),
    Policy(name="critical_batch", grid=measuring("critical_batch", kappa=(0.05, 0.2, 0.5))),
    Policy(name="progress_test", grid=measuring("progress_test")),
    Policy(name="noise_scale", grid=measuring("noise_scale")),
    Policy(name="CABS", grid=measuring("cabs")),
    Policy(name="AdaScale", grid=adascale),
    Policy(name="τ-nice", grid=tau_nice),
    Policy(name="auto", grid=auto, tuned=False),
)
