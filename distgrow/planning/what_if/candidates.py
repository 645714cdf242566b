"""Schedules that a run is compared to: every decay, and all growth that does not measure, at its η₀, b₀ and budget."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine
from distgrow.core.spec import Spec
from distgrow.core.spec_errors import explain
from distgrow.core.stages import Stages
from distgrow.core.yaml_text import plain, read_file, read_text
from distgrow.growth import Growth
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

    def controller(self, given: Mapping[str, Any]) -> Controller:
        """Return the decisions of a schedule on one rank.

        Args:
            given: `growth`, and if need be `lr` and `stages`, as in a config; what is missing is the recorded run's.

        Raises:
            ConfigError: It cannot be carried out, or goes by what it measures.
        """
        growth = {"start": self.start, **given["growth"]}
        if (growth.get("kind") in _OWN_START or growth.get("objective")) and "start" not in given["growth"]:
            del growth["start"]
        values = {**given, "growth": growth, "lr": {"base": self.lr.initial, **given.get("lr", {})}}
        try:
            found = Given.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise ConfigError("\n".join(explain(error, Given, values))) from None
        if found.growth.needs or found.growth.adaptive:
            raise ConfigError(
                f"growth.kind={found.growth.name} goes by what it measures as it trains, so its course is not known; "
                "the line of auto is {kind: matched, hold: 0.3}"
            )
        budget = Budget(samples=self.samples)
        schedule = Schedule(growth=found.growth, stages=found.stages, lr=found.lr, budget=budget)
        controller = schedule.controller(self.epoch, max_micro=self.epoch)
        controller.check()
        return controller

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


def wanted(setting: Setting, policies: list[str], everything: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names and values of the schedules that are asked for; all of them if none is named.

    Args:
        setting: What they have in common.
        policies: Names of `Setting.all`, YAML mappings, or files that end in .yaml and hold one.
        everything: Whether all are wanted beside those named.

    Raises:
        ConfigError: A policy is none of these.
    """
    known = setting.all()
    for policy in policies:
        yield policy if policy in known else _label(policy), known.get(policy) or _read(policy, known)
    if everything or not policies:
        yield from ((name, values) for name, values in known.items() if name not in policies)


def _read(policy: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a schedule from YAML, or those of a config file."""
    file = policy.endswith((".yaml", ".yml"))
    values = plain(read_file(policy) if file else read_text(policy, "--policy"))
    if isinstance(values, str):  # such as auto, or a kind that has to be told more
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


def _label(policy: str) -> str:
    return Path(policy).stem if policy.endswith((".yaml", ".yml")) else policy
