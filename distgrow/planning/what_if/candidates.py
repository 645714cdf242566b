"""Schedules that a run is compared to: every decay, and all growth that does not measure, at its η₀, b₀ and budget."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from distgrow.config.batch_tokens import with_batches_in_samples
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine, Rule
from distgrow.core.spec import Spec
from distgrow.core.spec_errors import explain, models_of, tags_of
from distgrow.core.stages import Stages
from distgrow.core.yaml_text import plain, read_file, read_text
from distgrow.growth import Growth
from distgrow.growth.base import Geometrical, GrowthPolicy, with_rule
from distgrow.growth.controller import Controller
from distgrow.growth.schedule import Schedule

#: Kinds of growth that have no b₀ of their own, or bring it.
_OWN_START = ("steps", "tau_nice", "adascale")
#: Keys of a schedule that --policy gives.
_SECTIONS = ("growth", "lr", "stages")


class Given(Spec):
    """Hold the keys of a config that decide batches and learning rates."""

    model_config = ConfigDict(extra="forbid")

    growth: Growth
    lr: LR
    stages: Stages = Stages()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Hold what all schedules have in common: that of the recorded run."""

    start: int  #: b₀
    cap: int
    lr: LR
    samples: int  #: of the whole run
    epoch: int
    own: Given | None = None  #: the schedule of the run; None: it is of no matter
    rule: Rule | None = None  #: how η follows the batch with the run's optimizer, if nothing else says so
    tokens: int | None = None  #: of every sample; None: that is not known

    def controller(self, given: Mapping[str, Any]) -> Controller:
        """Return the decisions of a schedule on one rank.

        Args:
            given: `growth`, and if need be `lr` and `stages`, as in a config. b₀ and η₀ that it leaves out are the
                recorded run's. Other keys that it leaves out are at their defaults; see `completed`.

        Raises:
            ConfigError: It cannot be carried out, or goes by what it measures.
        """
        found = self._checked(given)
        if found.growth.needs or found.growth.adaptive:
            raise ConfigError(
                f"growth.kind={found.growth.name} goes by what it measures as it trains, so its course is not known; "
                "the line of auto is {kind: matched, hold: 0.3}"
            )
        schedule = Schedule(
            growth=found.growth,
            stages=found.stages.model_copy(update={"every": found.stages.every.in_samples(self.tokens)}),
            lr=with_rule(found.growth, found.lr, self.rule),
            budget=Budget(samples=self.samples),
        )
        controller = schedule.controller(self.epoch, max_micro=self.epoch)
        controller.check()
        return controller

    def _checked(self, given: Mapping[str, Any]) -> Given:
        """Return a schedule with the run's b₀ and η₀, if it has none, and all batches in samples."""
        growth = {"start": self.start, **given["growth"]}
        spec = _spec(growth.get("kind"))
        own_start = growth.get("objective") or (spec is not None and spec.model_fields["kind"].default in _OWN_START)
        if own_start and "start" not in given["growth"]:
            del growth["start"]
        growth = with_batches_in_samples({"growth": growth, "task": {"tokens": self.tokens}})["growth"]
        values = {**given, "growth": growth, "lr": _under({"base": self.lr.initial}, given.get("lr", {}))}
        try:
            return Given.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise ConfigError("\n".join(explain(error, Given, values))) from None

    def completed(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a schedule in which what it leaves out is the run's, as far as its kind of growth takes that.

        These are the keys of `lr`, `stages` as a whole, and of `growth` the cap, or every key if the kind is the run's.
        """
        spec = _spec(given["growth"].get("kind"))
        if self.own is None or spec is None:  # the check of the whole says that there is no such kind
            return given
        rate = _without(self.own.lr, "base", "test", "measured", *(["rule"] if spec.brings_rule else []))
        found = {**given, "growth": self._grown(given["growth"], spec), "lr": _under(rate, given.get("lr", {}))}
        if not spec.sets_stages:
            found.setdefault("stages", _without(self.own.stages, *([] if issubclass(spec, Geometrical) else ["power"])))
        return found

    def _grown(self, given: Mapping[str, Any], spec: type[GrowthPolicy]) -> dict[str, Any]:
        """Return `growth` with what it leaves out, of the run."""
        if self.own is None or given.get("objective"):  # which decides start and cap
            return dict(given)
        own = _without(self.own.growth, "start", "objective")
        if not isinstance(self.own.growth, spec):
            own = {key: value for key, value in own.items() if key == "cap" and key in spec.model_fields}
        return {**own, **given}

    def all(self) -> dict[str, dict[str, Any]]:
        """Return every schedule that is compared by default, by its name."""
        return {**self._decays(), **(self._growth() if self.cap > self.start else {})}

    def _decays(self) -> dict[str, dict[str, Any]]:
        """Return the decays of η at constant b₀."""
        constant = {"kind": "constant"}
        decays = {
            "constant": self._wsd(0.0),
            "linear-decay": self._wsd(1.0),
            "cosine": {"kind": "cosine", "warmup": self._warmup},
            "wsd50": self._wsd(0.5),
            "wsd70": self._wsd(0.3),
            "wsd80": self._wsd(0.2),
        }
        return {name: {"growth": constant, "lr": {"decay": decay}} for name, decay in decays.items()}

    def _growth(self) -> dict[str, dict[str, Any]]:
        """Return growth of the kinds that know their course, with η constant where lr.rule could say otherwise."""
        capped, held = {"cap": self.cap}, {"decay": self._wsd(0.0), "rule": {"kind": "constant"}}
        doublings = math.ceil(math.log2(self.cap / self.start))
        stage = {"every": {"samples": max(1, self.samples // (doublings + 1))}}
        fifth = {"every": {"samples": max(1, self.samples // 6)}}
        linear, cosine = {"decay": self._wsd(1.0)}, {"decay": {"kind": "cosine", "warmup": self._warmup}}
        return {
            "matched": {"growth": {"kind": "matched", **capped}, "lr": {"decay": self._wsd(0.0)}},
            "matched-30": {"growth": {"kind": "matched", "hold": 0.3, **capped}, "lr": {"decay": self._wsd(0.0)}},
            "matched-wsd80": {"growth": {"kind": "matched", **capped}, "lr": {"decay": self._wsd(0.2)}},
            "matched-wsd50": {"growth": {"kind": "matched", **capped}, "lr": {"decay": self._wsd(0.5)}},
            "late": {"growth": {"kind": "late", **capped}, "lr": held},
            "exponential": {"growth": {"kind": "exponential", **capped}, "lr": held, "stages": stage},
            "linear": {
                "growth": {"kind": "linear", "increment": max(1, (self.cap - self.start) // 5), **capped},
                "lr": held,
                "stages": fifth,
            },
            "optimal": {"growth": {"kind": "optimal", **capped}, "lr": held},
            "seesaw": {"growth": {"kind": "seesaw", **capped}, "lr": cosine},
            "increase": {"growth": {"kind": "increase", **capped}, "lr": cosine},
            "temperature": {"growth": {"kind": "temperature", **capped}, "lr": linear},
        }

    @property
    def _warmup(self) -> float:
        return self.lr.decay.warmup if isinstance(self.lr.decay, Cosine | WSD) else 0.0

    def _wsd(self, decay: float) -> dict[str, Any]:
        warmup = min(self._warmup, 1 - decay)
        return {"kind": "wsd", "warmup": warmup, "decay": decay} if warmup or decay else {"kind": "none"}


def wanted(setting: Setting, policies: list[str], everything: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names and values of the schedules that are asked for; all of them if none is named.

    What YAML leaves out is the run's. What a config file leaves out is at its default, but for b₀ and η₀.

    Args:
        setting: What they have in common.
        policies: Names of `Setting.all`, YAML mappings, or files that end in .yaml and hold one.
        everything: Whether all are wanted beside those named.

    Raises:
        ConfigError: A policy is none of these.
    """
    known = setting.all()
    for policy in policies:
        if policy in known:
            yield policy, known[policy]
        else:
            sections = _read(policy, known)
            yield _label(policy), sections if _is_file(policy) else setting.completed(sections)
    if everything or not policies:
        yield from ((name, values) for name, values in known.items() if name not in policies)


def _read(policy: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a schedule from YAML, or those of a config file."""
    file = _is_file(policy)
    values = plain(read_file(policy) if file else read_text(policy, "--policy"))
    if isinstance(values, str) and _spec(values) is not None:  # such as auto, or a kind that has to be told more
        values = {"kind": values}
    if isinstance(values, dict) and "kind" in values:
        values = {"growth": values}
    if not isinstance(values, dict) or not isinstance(values.get("growth"), dict):
        raise ConfigError(
            f"--policy={policy}: name one of {', '.join(known)}; or give YAML, {{kind: …}} or {{growth: …, lr: …}}"
        )
    sections = {key: value for key, value in values.items() if key in _SECTIONS}
    if not file and len(sections) < len(values):
        wrong = next(key for key in values if key not in sections)
        raise ConfigError(f"--policy: {wrong}: unknown key; allowed here: {', '.join(_SECTIONS)}")
    return sections


def _spec(kind: Any) -> type[GrowthPolicy] | None:
    """Return what a growth.kind, or an old name of it, stands for. None: there is no such kind."""
    specs = [spec for spec in models_of(Growth) if issubclass(spec, GrowthPolicy)]
    return next((spec for spec in specs if kind in (*tags_of(spec), *spec.old_kinds)), None)


def _is_file(policy: str) -> bool:
    return policy.endswith((".yaml", ".yml"))


def _label(policy: str) -> str:
    return Path(policy).stem if _is_file(policy) else policy


def _under(known: Mapping[str, Any], given: Any) -> Any:
    """Return a section with what it leaves out; what is no section as it is, for its check to say so."""
    return {**known, **given} if isinstance(given, Mapping) else given


def _without(spec: Spec, *keys: str) -> dict[str, Any]:
    """Return the values of a spec as JSON has them, without some keys, and without those that are null."""
    return spec.model_dump(mode="json", exclude=set(keys), exclude_none=True)
