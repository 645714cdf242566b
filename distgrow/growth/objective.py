"""Objective: start and cap that follow from a cluster's pace and the noise scale, in place of numbers. Pure."""

import math
from typing import Any

from pydantic import ValidationError, model_validator

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.pace import Pace
from distgrow.core.spec import PosFloat, PosInt, Spec, by_position
from distgrow.growth.base import Geometrical
from distgrow.theory.noise import fastest_batch, half_batch

#: b*/WIDTH is start, and b*·WIDTH is cap, if one noise scale is known. In between, time per progress is at most
#: (WIDTH + 2 + 1/WIDTH)/4 = 1.125 times the least, whatever the pace and the noise scale are.
WIDTH = 2

#: Largest b* that can be meant, and the inverse of the least; beyond them a number is in another unit.
LARGEST = 1e12


class Objective(Spec):
    """Least time to the same loss on a cluster: start and cap follow from b*, the batch of most progress per second.

    b* = √(n½·B), B the noise scale, n½ = latency_s · workers · samples_per_s the batch at which half of an update is
    its fixed part. From one B: start b*/2, cap 2·b*. From B at both ends of a run: b* at the one, and at the other.
    Derived for this project, after McCandlish et al. 2018, arXiv 1812.06162.
    """

    workers: PosInt
    """Workers of the cluster. Batches are multiples of them."""
    noise: PosFloat
    """B, the noise scale tr Σ/‖∇f‖², samples, as an earlier run has measured it; at its beginning if `noise_at_end` is
    given."""
    noise_at_end: PosFloat | None = None
    """B at the end of the run, where it is larger. Default: `noise` is all that is known."""
    latency_s: PosFloat
    """Seconds of an update on so many workers that its rows do not explain: communication, the optimizer's step."""
    samples_per_s: PosFloat
    """Samples that one worker computes in a second."""
    most: PosInt | None = None
    """Largest batch, such as the training set; start is then at most a quarter of it, but at least
    a row for each worker. Default: none."""

    @model_validator(mode="after")
    def _can_be(self) -> "Objective":
        if self.most is not None and self.most < self.workers:
            raise ConfigError(
                f"most={self.most} is below workers={self.workers}, each of which needs a row: raise most, or lower "
                "workers"
            )
        if self.noise_at_end is not None and self.noise_at_end < self.noise:
            raise ConfigError(
                f"noise_at_end={self.noise_at_end:g} is below noise={self.noise:g}, and batches only grow: give noise "
                "alone"
            )
        for key in ("noise", "noise_at_end"):
            noise = getattr(self, key)
            if noise is not None and not 1 / LARGEST <= self.fastest(noise) <= LARGEST:
                raise ConfigError(
                    f"{key}={noise:g} makes b* = √(latency_s={self.latency_s:g} · workers={self.workers:g} · "
                    f"samples_per_s={self.samples_per_s:g} · {noise:g}) {self.fastest(noise):.3g} samples, not between "
                    f"{1 / LARGEST:g} and {LARGEST:g}: give latency_s in seconds of an update, samples_per_s of one "
                    "worker, and noise in samples"
                )
        return self

    @property
    def pace(self) -> Pace:
        """Return the pace of the cluster."""
        return Pace(samples_per_s=self.samples_per_s, latency_s=self.latency_s)

    @property
    def half(self) -> float:
        """Return n½, samples."""
        return half_batch(self.latency_s, self.workers * self.samples_per_s)

    @property
    def scale(self) -> float:
        """Return the one noise scale that stands for the run: of two the geometric mean."""
        return math.sqrt(self.noise) * math.sqrt(self.noise_at_end or self.noise)

    def fastest(self, scale: float) -> float:
        """Return b* at a noise scale, samples."""
        return fastest_batch(self.latency_s, self.workers * self.samples_per_s, scale)

    def decided(self) -> dict[str, int]:
        """Return start, a multiple of the workers, and cap, a multiple of start, nearest to what the formulas give."""
        if self.noise_at_end is None:
            first, last = self.fastest(self.noise) / WIDTH, self.fastest(self.noise) * WIDTH
        else:
            first, last = self.fastest(self.noise), self.fastest(self.noise_at_end)
        most = math.inf if self.most is None else self.most
        rows = max(1, int(min(round(first / self.workers), most // (WIDTH**2 * self.workers))))
        start = rows * self.workers
        return {"start": start, "cap": start * max(1, int(min(round(last / start), most // start)))}

    def sentence(self) -> str:
        """Return what is decided, and from what."""
        free, decided = self.model_copy(update={"most": None}).decided(), self.decided()
        limited = "" if free == decided else f", as growth.objective.most={self.most} allows no more"
        if limited and decided["start"] == decided["cap"] != free["cap"]:
            limited += f"; so the batch never grows: raise most to {2 * decided['start']} or more, or lower workers"
        known = [self.noise] if self.noise_at_end is None else [self.noise, self.noise_at_end]
        scales = " to ".join(f"{value:,.4g}" for value in known)
        best = " to ".join(f"{self.fastest(value):,.0f}" for value in known)
        return (
            f"growth.objective: on {counted(self.workers, 'worker')} half of an update is latency at "
            f"n½ = {self.half:,.0f}; at a noise scale of {scales} b* = {best} is fastest: start "
            f"{decided['start']:,}, cap {decided['cap']:,}{limited}"
        )


class Aimed(Geometrical):
    """Growth from a start to a cap that is planned beforehand, so that both can follow from an objective."""

    objective: Objective | None = None
    """What start and cap follow from, in place of numbers: least time to the same loss on a cluster."""

    def fits(self, epoch: int) -> str | None:
        """Return that the objective's most, or its workers, have to be lowered; None: there is no objective."""
        if self.objective is None:
            return None
        key = "workers" if self.objective.workers > epoch else "most"
        return f"growth.objective decides it: set growth.objective.{key} to at most {epoch}"

    @model_validator(mode="before")
    @classmethod
    def _start_and_cap_follow(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("objective") is None:
            return values
        try:
            decided = Objective.model_validate(values["objective"]).decided()
        except ValidationError:
            return values  # told by the check of the field itself
        for key, number in decided.items():
            if values.get(key) not in (None, number):
                raise ConfigError(
                    f"{key}={values[key]} and objective, which makes {key} {number}, decide the same: remove one of "
                    "the two"
                )
        return {**values, **decided}


objective = by_position(Objective, "workers", "noise", "latency_s", "samples_per_s")
