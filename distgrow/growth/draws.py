"""What a sampling makes of a planned batch: how many samples an update draws, and which batches it cannot draw."""

from typing import NamedTuple

from distgrow.core.plan import split, split_drawn
from distgrow.core.progress import Progress
from distgrow.core.sampling import SamplingSpec


def draws_size(sampling: SamplingSpec | None) -> bool:
    """Return whether the samples of an update are a random number, whose mean is the planned batch."""
    return sampling is not None and sampling.draws_size


class Drawn(NamedTuple):
    """Hold how many samples an update has, and what else a Plan says of their number."""

    batch: int
    expected: int | None = None
    draw: int = 0


def drawn_batch(sampling: SamplingSpec | None, n: int, seed: int, progress: Progress, batch: int) -> Drawn:
    """Return the samples that the update at `progress` draws of a training set of `n`, if `batch` is planned."""
    if sampling is None or not sampling.draws_size:
        return Drawn(batch)
    return Drawn(sampling.size(n, seed, progress.samples, progress.step, batch), expected=batch, draw=progress.step)


def split_of(sampling: SamplingSpec | None, batch: int, world: int, max_micro: int) -> tuple[int, int]:
    """Return (micro, accum) of an update; see `split`, or `split_drawn` if its samples are a random number."""
    return (split_drawn if draws_size(sampling) else split)(batch, world, max_micro)


def problems_of(sampling: SamplingSpec | None, n: int, stage: int, batch: int) -> list[str]:
    """Return what keeps the batch of a stage from being drawn out of `n` samples."""
    if sampling is None or batch <= (most := sampling.largest(n)):
        return []
    return [f"batch={batch} of stage {stage} exceeds what sampling can draw, {most} rows"]
