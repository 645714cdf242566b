"""Which growth, optimizer and engine go together, by what each says that it can; importing this loads no torch."""

from collections.abc import Mapping

from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.noise_stats import Measuring
from distgrow.core.sampling import SamplingSpec
from distgrow.core.sparsity import Sparsity
from distgrow.engine.ability import Can
from distgrow.engine.spec import EngineSpec
from distgrow.growth.base import GrowthPolicy, Measure
from distgrow.growth.branching import Branching
from distgrow.optim import OptimizerSpec


def check_compatible(growth: GrowthPolicy, optimizer: OptimizerSpec, engine: EngineSpec) -> None:
    """Check that growth, optimizer and engine go together.

    Raises:
        ConfigError: Growth goes by what the optimizer's or the engine's updates do not show, or the engine cannot
            make the optimizer's steps.
    """
    engine.check_optimizer(optimizer)
    engine.check_growth(growth)
    if growth.plain_sgd and not optimizer.plain_sgd:
        raise ConfigError(
            f"growth.kind={growth.name} holds for SGD without momentum, optimizer.kind={optimizer.summary} is none: "
            "set optimizer.momentum=0, or use growth.kind noise_scale, or critical_batch with kappa"
        )
    if Measure.PRECONDITIONED in growth.needs and (
        optimizer.preconditioner() is None or Can.PRECONDITION not in engine.can
    ):
        raise ConfigError(
            "growth.norm=preconditioned goes by the second moments of AdamW as plain torch keeps them, and there are "
            f"none with optimizer.kind={optimizer.summary} and engine.kind={engine.kind}: use optimizer.kind=adamw "
            "with engine.kind=torch, or growth.norm=plain"
        )
    if Measure.PROGRESS in growth.needs and Can.TEST_PROGRESS not in engine.can:
        raise ConfigError(
            f"growth.kind={growth.name} holds each gradient against the update before, which engine.kind="
            f"{engine.kind} cannot: use engine.kind=torch, or growth.kind critical_batch"
        )
    if engine.delay:
        _check_delayed(growth, optimizer, engine.delay)


def check_prunes(sparsity: Sparsity | None, engine: EngineSpec, extrapolate: Extrapolate | None) -> None:
    """Check that pruned weights can be kept at 0.

    Raises:
        ConfigError: It cannot.
    """
    if sparsity is None or not sparsity.target:
        return
    if extrapolate is not None:
        raise ConfigError(
            f"sparsity.target={sparsity.target:g} keeps weights at 0, from which extrapolate.kind={extrapolate.kind} "
            "would shift them: leave out one of the two"
        )
    if Can.PRUNE in engine.can:
        return
    raise ConfigError(
        f"sparsity.target={sparsity.target:g} needs the masks where gradients are computed and applied, which "
        f"engine.kind={engine.kind} "
        + (
            f"has with {engine.prunes_with} alone: set these, or use engine.kind=torch, or "
            if engine.prunes_with
            else "does not have: use engine.kind=torch, or "
        )
        + "leave out sparsity"
    )


def check_drawn_sizes(sampling: SamplingSpec | None, engine: EngineSpec, extrapolate: Extrapolate | None) -> None:
    """Check that updates may have any number of samples, if the sampling draws it.

    Raises:
        ConfigError: They may not.
    """
    if sampling is None or not sampling.draws_size:
        return
    what = f"sampling.kind={sampling.name} draws updates of any size"
    if Can.LEAVE_OUT not in engine.can:
        raise ConfigError(
            f"{what}, some of which leave ranks without a sample, which engine.kind={engine.kind} cannot train on: use "
            "engine.kind=torch, or sampling.kind=nice"
        )
    if extrapolate is not None and extrapolate.local:
        raise ConfigError(
            f"{what}, and extrapolate.local=true shifts each group or rank by its own mean: leave out "
            "extrapolate.local, or use sampling.kind=nice"
        )


def _check_delayed(growth: GrowthPolicy, optimizer: OptimizerSpec, delay: int) -> None:
    """Check that growth and optimizer go with gradients that are applied `delay` updates late."""
    if Measure.PROGRESS in growth.needs:
        raise ConfigError(
            f"engine.delay={delay} applies gradients late, and growth.kind={growth.name} holds each against the update "
            "before, which is then another one's: set engine.delay=0, or growth.kind noise_scale or critical_batch"
        )
    if optimizer.goes_by_parts:
        raise ConfigError(
            f"engine.delay={delay} applies gradients late, and optimizer.kind={optimizer.name} goes by the "
            "micro-batches of the present one: set engine.delay=0, or optimizer.kind lars or lamb"
        )


def check_ahead(
    engine: EngineSpec,
    *,
    growth: GrowthPolicy,
    optimizer: OptimizerSpec,
    measuring: Measuring,
    budget: Budget,
    others: Mapping[str, bool],
) -> None:
    """Check that nothing needs to know at once what an update gave, if the engine tells it with the next one.

    Args:
        engine: The engine.
        growth: The growth policy.
        optimizer: The optimizer.
        measuring: Of the noise.
        budget: The run's.
        others: What else needs to know at once, by its key: whether it is used.

    Raises:
        ConfigError: Something does.
    """
    if not engine.ahead:
        return
    late = {
        "growth.norm=preconditioned": Measure.PRECONDITIONED in growth.needs,
        f"growth.kind={growth.name} with optimizer.kind={optimizer.name}": (
            Measure.PROGRESS in growth.needs and optimizer.per_tensor
        ),
        "run.noise.by_parameter=true": measuring.by_parameter,
        f"budget.tokens={budget.tokens}, which are counted,": budget.tokens is not None and budget.samples is not None,
        **others,
    }
    if asks := [what for what, does in late.items() if does]:
        raise ConfigError(
            f"{asks[0]} needs at once what an update gave, which engine.ahead={engine.ahead} tells one update later: "
            "set engine.ahead=0, or leave it out"
        )


def check_branching(
    growth: GrowthPolicy, engine: EngineSpec, budget: Budget, sampling: SamplingSpec | None, sparsity: Sparsity | None
) -> None:
    """Check that a run can go back to where its branches began, and that they see the same samples.

    Raises:
        ConfigError: It cannot, or they do not.
    """
    if not isinstance(growth, Branching):
        return
    what = f"growth.kind={growth.name} goes back to where branches began"
    if engine.ahead:
        raise ConfigError(f"{what}, and engine.ahead={engine.ahead} tells each update one later: set engine.ahead=0")
    if sparsity is not None and sparsity.target:
        raise ConfigError(
            f"{what}, and sparsity.target={sparsity.target:g} prunes weights that do not come back: leave out sparsity"
        )
    if sampling is not None:
        raise ConfigError(
            f"growth.kind={growth.name} compares branches on the same samples, and sampling.kind={sampling.name} draws "
            "other ones for other batches: leave out sampling"
        )
    if budget.tokens is not None and budget.samples is not None:
        raise ConfigError(
            f"growth.kind={growth.name} compares branches of equal samples, and budget.tokens={budget.tokens}, which "
            "are counted, may end in one: give the budget in samples"
        )


def check_extrapolation(
    extrapolate: Extrapolate,
    *,
    growth: GrowthPolicy,
    optimizer: OptimizerSpec,
    engine: EngineSpec,
    measuring: Measuring,
    budget: Budget,
) -> None:
    """Check that all else goes with gradients at a shifted point.

    Raises:
        ConfigError: It does not.
    """
    what = f"extrapolate.kind={extrapolate.kind}"
    if Can.EXTRAPOLATE not in engine.can:
        raise ConfigError(f"{what} is unknown to engine.kind={engine.kind}: use engine.kind=torch, or leave it out")
    if engine.delay:
        raise ConfigError(
            f"{what} and engine.delay={engine.delay} would both move where a gradient is evaluated: set "
            "engine.delay=0, or leave out extrapolate"
        )
    if growth.plain_sgd:
        raise ConfigError(
            f"growth.kind={growth.name} holds for SGD at the parameters themselves, and {what} shifts them: use "
            "growth.kind noise_scale or critical_batch, or leave out extrapolate"
        )
    if Measure.PROGRESS in growth.needs:
        raise ConfigError(
            f"growth.kind={growth.name} holds each gradient against the update before, and {what} evaluates it beside "
            "the parameters which that led to: use growth.kind critical_batch, or leave out extrapolate"
        )
    if extrapolate.kind == "fresh" and budget.sfo is not None:
        raise ConfigError(
            f"budget.sfo={budget.sfo} plans one evaluation of a sample, and {what} makes two: give budget.samples, "
            f"half as many"
        )
    if not extrapolate.shows_noise:
        _check_no_noise(f"{what} with local=true" if extrapolate.local else what, growth, optimizer, measuring)
    if extrapolate.group is not None:
        _check_groups(extrapolate.group, growth, engine)


def _check_no_noise(what: str, growth: GrowthPolicy, optimizer: OptimizerSpec, measuring: Measuring) -> None:
    """Check that nothing goes by noise, which micro-batches at shifted points do not show."""
    asks = [f"growth.kind={growth.name}"] if Measure.NOISE in growth.needs else []
    asks += [f"optimizer.kind={optimizer.name}"] if optimizer.goes_by_parts else []
    asks += [f"run.noise.every={measuring.every}"] if measuring.every is not None else []
    asks += ["run.noise.by_parameter=true"] if measuring.by_parameter else []
    if asks:
        raise ConfigError(
            f"{asks[0]} measures noise by how micro-batches of an update differ, and {what} adds what their shifts "
            "make of it: use extrapolate.kind past or noise without local, or choose what does not go by noise"
        )


def _check_groups(group: int, growth: GrowthPolicy, engine: EngineSpec) -> None:
    """Check that batches can come in micro-batches that are the groups of a local shift."""
    if engine.max_micro == "auto" or engine.max_micro < group:
        raise ConfigError(
            f"extrapolate.group={group} rows are a micro-batch, which engine.max_micro={engine.max_micro} must allow: "
            f"set engine.max_micro={group}, or lower extrapolate.group"
        )
    if growth.adaptive:
        raise ConfigError(
            f"extrapolate.group={group} rows must divide every batch, which growth.kind={growth.name} decides by what "
            "it measures: use a growth.kind that is planned, such as exponential, or leave out extrapolate.local"
        )
