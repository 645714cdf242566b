"""What adaptive growth could fail by, since measurements decide about its stages."""

from distgrow.growth.base import GrowthPolicy


def unknowns(growth: GrowthPolicy, stage: int, world: int, measured_every: int | None, max_micro: int) -> list[str]:
    """Return by what adaptive growth could fail at a stage. Of any other growth there is nothing.

    Args:
        growth: The policy.
        stage: The stage.
        world: Ranks at the stage.
        measured_every: Updates from one measurement of noise to the next, if the config sets it.
        max_micro: Rows of a micro-batch, at most.
    """
    if not growth.adaptive:
        return []
    found: list[str] = []
    if growth.measures and growth(stage) == world == 1:
        found.append(
            f"growth.kind={growth.name} goes by gradient noise, which a batch of one sample on one rank does not "
            "show; raise growth.start to at least 2"
        )
    if (every := measured_every or 0) > growth.measures_within:
        found.append(
            f"run.noise.every={every}: noise is measured less often than growth.kind={growth.name} goes by it, "
            f"which is every {growth.measures_within:g} updates; lower it to that or raise growth.every"
        )
    if growth.start < world <= growth(stage):
        found.append(
            f"stage {stage} wants {world} ranks, but the budget may end with a batch of growth.start="
            f"{growth.start}; raise growth.start to at least {world} or lower launch.workers"
        )
    if max_micro == 1 and world > 1:
        found.append(
            f"max_micro=1 cannot split every batch that the budget may end with over {world} ranks; "
            "raise engine.max_micro to 2"
        )
    return found
