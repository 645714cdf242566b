"""Checks of what a policy answers: a policy of a user's own may be wrong in ways that no type shows."""

import math
from collections.abc import Callable, Set
from functools import lru_cache, partial

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, NoDecay, Span
from distgrow.core.noise_stats import Measuring
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, PolicyState, Progress
from distgrow.core.sampling import SamplingSpec
from distgrow.growth.adaptive import NormProbing
from distgrow.growth.base import GrowthPolicy, Measure


def check_needs(policy: GrowthPolicy) -> None:
    """Check that the policy needs what can be measured.

    Raises:
        ConfigError: It does not.
    """
    known = ", ".join(f"Measure.{measure.name}" for measure in Measure)
    if unknown := [str(need) for need in policy.needs if not isinstance(need, Measure)]:
        raise ConfigError(f"{_of(policy)}.needs has {', '.join(unknown)}; it may have {known}")
    if Measure.NORM in policy.needs and not isinstance(policy, NormProbing):
        raise ConfigError(f"{_of(policy)}.needs has Measure.NORM; derive it from NormProbing, which asks for the norm")


def checked_batch(policy: GrowthPolicy, stage: int) -> int:
    """Return the policy's batch at a stage.

    Raises:
        ConfigError: It is no whole number from 1 on.
    """
    batch = policy.stage_batch(stage)
    if type(batch) is not int or batch < 1:
        raise ConfigError(f"{_of(policy)}.stage_batch({stage}) is {batch!r}; it must be a whole number from 1 on")
    return batch


def checked_multiplier(policy: GrowthPolicy, multiplier: float) -> float:
    """Return the policy's factor of the learning rate.

    Raises:
        ConfigError: It is no number, or negative.
    """
    if not isinstance(multiplier, int | float) or math.isnan(multiplier) or multiplier < 0:
        raise ConfigError(f"{_of(policy)}.multiplier is {multiplier!r}; it must be a number from 0 on")
    return multiplier


def checked_rate(policy: GrowthPolicy, lr: LR, progress: Progress, batch: int, span: Span) -> float:
    """Return the learning rate of an update of `batch` samples.

    Raises:
        ConfigError: It is no finite number.
    """
    try:
        rate = lr.initial * checked_multiplier(policy, policy.multiplier(lr, progress, batch, span))
    except OverflowError:
        rate = math.inf
    if rate == math.inf:
        raise ConfigError(
            f"lr.base={lr.initial:g} grows beyond all numbers by stage {progress.stage}; "
            "set growth.cap, lengthen the stages or choose a slower lr.rule"
        )
    return rate


def rates(policy: GrowthPolicy, lr: LR, span: Span) -> Callable[[Progress, int], float]:
    """Return what gives the learning rate of an update by the progress and its samples, as `checked_rate` does.

    If nothing but the stage and the samples matters, each pair of them is computed once.
    """
    if type(policy).multiplier is not GrowthPolicy.multiplier or not isinstance(lr.decay, NoDecay):
        return partial(checked_rate, policy, lr, span=span)
    known = lru_cache(lambda stage, batch: checked_rate(policy, lr, Progress(stage=stage), batch, span))
    return lambda progress, batch: known(progress.stage, batch)


def check_sampling(
    sampling: SamplingSpec | None, epoch: int, policy: GrowthPolicy, needs: Set[Measure], measuring: Measuring
) -> None:
    """Check that rows can be drawn so, and that nothing goes by noise that such batches do not show.

    Raises:
        ConfigError: They cannot, or something does.
    """
    if sampling is None:
        return
    sampling.check(epoch)
    if sampling.draws_size and policy.adaptive:
        raise ConfigError(
            f"growth.kind={policy.name} decides by what it measures of updates, and sampling.kind={sampling.name} "
            "draws updates of any size: use a growth.kind that is planned, such as exponential, or sampling.kind=nice"
        )
    if sampling.shows_noise or not (Measure.NOISE in needs or measuring.asked):
        return
    asked = "run.noise.by_parameter=true" if measuring.by_parameter else f"run.noise.every={measuring.every}"
    what = asked if Measure.NOISE not in needs else "the optimizer"
    what = f"growth.kind={policy.name}" if Measure.NOISE in policy.needs else what
    raise ConfigError(
        f"{what} measures noise by how micro-batches of an update differ, which is not how batches of sampling.kind="
        f"{sampling.name} differ; use sampling.kind=nice, leave out sampling, or choose what does not go by noise"
    )


def checked_state(policy: GrowthPolicy, progress: Progress, plan: Plan, outcome: Outcome) -> PolicyState:
    """Return the policy's state once it knows what an update gave.

    Args:
        policy: The policy.
        progress: The progress before it knew.
        plan: The update's.
        outcome: What it gave.

    Raises:
        ConfigError: A checkpoint could not give it back as it is: it is no dict of plain numbers by names.
    """
    state = policy.after(progress, plan, outcome)
    if state is progress.policy:
        return state
    if not isinstance(state, dict):
        raise ConfigError(f"{_of(policy)}.after returned {type(state).__name__}; it must return a dict")
    for key, value in state.items():
        if type(key) is not str or type(value) not in (int, float, bool):
            raise ConfigError(
                f"{_of(policy)}.after returned {{{key!r}: {value!r}}}; keys must be str, and values int, float or "
                "bool, as a checkpoint gives back no others"
            )
    return state


def _of(policy: GrowthPolicy) -> str:
    return type(policy).__name__
