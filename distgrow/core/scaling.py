"""ScalingPolicy: how many ranks each stage wants, as `launch.workers` says. Pure; starts none of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import PlainSerializer, PlainValidator

from distgrow.core.errors import ConfigError


class ScalingPolicy(Protocol):
    """Tell how many ranks a stage wants. Nothing else computes it."""

    def __call__(self, stage: int, batch: int, max_micro: int) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Want the same number throughout."""

    workers: int

    def __call__(self, stage: int, batch: int, max_micro: int) -> int:
        return self.workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Want as many ranks as get a full micro-batch each, between `least` and `most`."""

    least: int
    most: int

    def __call__(self, stage: int, batch: int, max_micro: int) -> int:
        return max(self.least, min(batch // max_micro, self.most))


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Want a number of ranks from a stage on. The first stage is 0, and the stages rise."""

    workers: tuple[tuple[int, int], ...]  #: (stage, ranks from it on)

    def __call__(self, stage: int, batch: int, max_micro: int) -> int:
        return next(workers for first, workers in reversed(self.workers) if first <= stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Describe a group of ranks that may be followed by one of another size."""

    scaling_policy: ScalingPolicy
    asked: int  #: ranks that its first stage wanted; the cluster may have given fewer


# ── what a config says ──────────────────────────────────────────────────────────────────────────────────────────

_FORMS = "write a number, a range [least, most], or from which stage on how many, {0: 1, 3: 4}"


def scaling_policy(workers: "Workers") -> ScalingPolicy:
    """Return the policy that one of the three forms of `launch.workers` describes."""
    if isinstance(workers, int):
        return Fixed(workers=workers)
    if isinstance(workers, list):
        return Range(least=workers[0], most=workers[1])
    return Staged(workers=tuple(sorted(workers.items())))


def least(workers: "Workers") -> int:
    """Return the fewest ranks to go on with if a cluster has not all that are wanted."""
    return 1 if isinstance(workers, dict) else min(_numbers(workers))


def most(workers: "Workers") -> int:
    """Return the most ranks that any stage wants."""
    return max(_numbers(workers))


def _numbers(workers: "Workers") -> list[int]:
    if isinstance(workers, int):
        return [workers]
    return workers if isinstance(workers, list) else list(workers.values())


def _checked(given: Any) -> Any:
    """Return `launch.workers` as it is written. Raise ConfigError if it has none of the three forms."""
    if isinstance(given, list):
        return _range(given)
    if isinstance(given, Mapping):
        return _by_stage(given)
    if not _counts(given):
        raise ConfigError(f"{given!r} is no number of workers (1 or more); {_FORMS}")
    return given


def _range(given: list[Any]) -> list[int]:
    if len(given) != 2 or not all(_counts(workers) for workers in given):
        raise ConfigError(f"{given} is no range of two numbers from 1 on; {_FORMS}")
    if given[0] > given[1]:
        raise ConfigError(f"the range {given} begins above its end; write [{given[1]}, {given[0]}]")
    return given


def _by_stage(given: Mapping[Any, Any]) -> dict[int, int]:
    by_stage: dict[Any, Any] = {_stage(key): given[key] for key in given}
    for stage, workers in by_stage.items():
        if type(stage) is not int or stage < 0 or not _counts(workers):
            raise ConfigError(
                f"{{{stage!r}: {workers!r}}} is no stage (0 or more) and its workers (1 or more); {_FORMS}"
            )
    if 0 not in by_stage:
        raise ConfigError(f"{given} does not say how many workers stage 0 has; add 0: 1")
    return by_stage


def _stage(key: Any) -> Any:
    """Return a stage's number. JSON writes the key 0 as "0"."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _counts(given: Any) -> bool:
    return type(given) is int and given >= 1


#: 4 | [1, 8] | {0: 1, 3: 4}
Workers = Annotated[
    int | list[int] | dict[int, int],
    PlainValidator(_checked),
    PlainSerializer(lambda workers: workers, return_type=Any),  # pydantic's own warns of a mapping's keys
]
