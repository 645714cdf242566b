"""Hooks: calls the hooks of a run, keeps their state, and brings their wishes together; knows no hook by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.distributed.world import World
from distgrow.engine.state import read, written
from distgrow.tasks.raised import told_as
from distgrow.training.hooks import (
    METHODS,
    EndRun,
    EvaluationMade,
    Hook,
    HookPlace,
    KeepCheckpoint,
    RunBegun,
    RunEnded,
    UpdateMade,
    Wish,
)

if TYPE_CHECKING:
    from torch import nn

#: A checkpoint's file with the state of the hooks.
STATE = "hooks.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Hold what any rank's hooks ask for."""

    end: str | None = None  #: the reason
    keep: tuple[str, ...] = ()  #: names for a checkpoint of this place


class Hooks:
    """Call the hooks of one run. Nothing is made or called for a method that no hook has."""

    def __init__(self, hooks: Sequence[Any], world: World, folder: Path, epoch: int) -> None:
        """Take the hooks, which must be the same on every rank, and the samples of an epoch."""
        self._hooks, self._world, self._folder, self._epoch = hooks, world, folder, epoch
        self._calls = {name: [*_calls(hooks, name)] for name in METHODS}
        self._after_update = self._calls["after_update"]
        self._wish: str | None = None  # this rank's reason to end
        self._evaluated = (-1, -1)  # step and samples of the last evaluation that hooks have seen
        self.version = 0  #: evaluations that hooks have seen; their state changes with it

    @property
    def stateful(self) -> bool:
        """Whether an evaluation changes what a checkpoint holds."""
        return bool(self._calls["after_eval"])

    def begin(self, progress: Progress, model: "nn.Module", tests: Sequence[str], *, resumed: bool) -> None:
        """Call the hooks before the first update of this process. Collective: every rank must call."""
        run = RunBegun(
            **self._place(progress), model=model, dir=self._folder, tests=tuple(tests), resumed=resumed,
            rank=self._world.rank, world=self._world.size,
        )  # fmt: skip
        self._call_all("begin", run)

    def after_update(self, progress: Progress, plan: Plan, outcome: Outcome) -> None:
        """Call the hooks, on this rank alone."""
        if not self._after_update:
            return
        update = UpdateMade(
            **self._place(progress), batch=plan.batch, lr=plan.lr, loss=outcome.loss, grad_norm=outcome.grad_norm,
            applied=outcome.applied,
        )  # fmt: skip
        for name, call in self._after_update:
            wish = _called(name, call, update)
            if isinstance(wish, EndRun) and self._wish is None:
                self._wish = wish.reason

    def wants_end(self) -> bool:
        """Return whether this rank wants the end, to be voted on with the next update."""
        return self._wish is not None

    def reason(self) -> str:
        """Return why the ranks end the run: the first rank's reason of those that have one. Collective."""
        return next(reason for reason in self._world.gather(self._wish) if reason is not None)

    def after_eval(self, progress: Progress, metrics: Mapping[str, float]) -> Asked:
        """Call the hooks, unless they have seen this evaluation, and return what they ask for. Collective."""
        place = (progress.step, progress.samples)
        if not self._calls["after_eval"] or not metrics or place == self._evaluated:
            return Asked()
        self._evaluated, self.version = place, self.version + 1
        made = EvaluationMade(**self._place(progress), metrics=dict(metrics))
        wishes = [wish for part in self._world.gather(self._call_all("after_eval", made)) for wish in part]
        ends = [wish.reason for wish in wishes if isinstance(wish, EndRun)]
        keep = dict.fromkeys(wish.name for wish in wishes if isinstance(wish, KeepCheckpoint))
        return Asked(end=ends[0] if ends else None, keep=tuple(keep))

    def before_checkpoint(self, progress: Progress) -> dict[str, bytes]:
        """Call the hooks, and return the file with their state. Collective: every rank must call."""
        self._call_all("before_checkpoint", HookPlace(**self._place(progress)))
        return self._world.on_all_ranks(self._state) if self._hooks else {}

    def _state(self) -> dict[str, bytes]:
        """Return the first rank's state, which the others need not know."""
        if self._world.rank > 0:
            return {}
        states: list[tuple[str, Any]] = []
        for hook in self._hooks:
            if callable(getattr(hook, "state_dict", None)):
                with told_as(f"{_name(hook)}.state_dict raised"):
                    states.append((_name(hook), hook.state_dict()))
        state = {"states": states, "evaluated": self._evaluated}
        return {STATE: written(state, "a hook")} if states or self.stateful else {}

    def load(self, folder: Path) -> None:
        """Give the hooks their state of a checkpoint; one that was not there then has none."""
        file = folder / STATE
        if not file.is_file():
            return
        state = read(file, torch.device("cpu"))
        self._evaluated = tuple(state["evaluated"])
        waiting = list(state["states"])
        for hook in self._hooks:
            found = next((entry for entry in waiting if entry[0] == _name(hook)), None)
            if found is not None and callable(getattr(hook, "load_state_dict", None)):
                waiting.remove(found)
                with told_as(f"{_name(hook)}.load_state_dict raised"):
                    hook.load_state_dict(found[1])

    def end(self, progress: Progress, *, reason: str, finished: bool, metrics: Mapping[str, float]) -> None:
        """Call the hooks after the last checkpoint. Collective: every rank must call."""
        ended = RunEnded(**self._place(progress), reason=reason, finished=finished, metrics=dict(metrics))
        self._call_all("end", ended)

    def _call_all(self, method: str, value: Any) -> list[Wish]:
        """Call a method of every hook, and return what they ask for; an error of one rank is raised on all."""
        calls = self._calls[method]
        if not calls:
            return []
        answers = self._world.on_all_ranks(lambda: [_called(name, call, value) for name, call in calls])
        return [answer for answer in answers if answer is not None]

    def _place(self, progress: Progress) -> dict[str, Any]:
        return {
            "step": progress.step,
            "samples": progress.samples,
            "epoch": progress.samples / self._epoch,
            "stage": progress.stage,
        }


def _calls(hooks: Sequence[Any], method: str) -> list[tuple[str, Callable[[Any], Any]]]:
    """Return the named methods of the hooks that have it; that of `Hook` itself does nothing."""
    found = [(hook, getattr(hook, method, None)) for hook in hooks]
    idle = getattr(Hook, method)
    return [
        (f"{_name(hook)}.{method}", call)
        for hook, call in found
        if callable(call) and getattr(call, "__func__", None) is not idle
    ]


def _called(name: str, call: Callable[[Any], Any], value: Any) -> Wish | None:
    """Call a hook, and return what it asks for.

    Raises:
        ConfigError: It raised, or asks for what it cannot have there.
    """
    with told_as(f"{name} raised"):
        wish = call(value)
    if isinstance(wish, EndRun) and isinstance(value, UpdateMade | EvaluationMade):
        return EndRun(_text(name, "reason", wish.reason))
    if isinstance(wish, KeepCheckpoint) and isinstance(value, EvaluationMade):
        return KeepCheckpoint(_text(name, "name", wish.name))
    if wish is None:
        return None
    allowed = {UpdateMade: ", or EndRun(reason)", EvaluationMade: ", EndRun(reason) or KeepCheckpoint(name)"}
    raise ConfigError(f"{name} returned {wish!r}: allowed is None{allowed.get(type(value), '')}")


def _text(name: str, what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}: {what}={value!r} must be a text that is not empty")
    return value


def _name(hook: Any) -> str:
    return f"{type(hook).__module__}:{type(hook).__qualname__}"
