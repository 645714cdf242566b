"""Growth learned by branches against the loss of the evaluation set (the sound form of arXiv 2205.08231)."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.core.spec import PosInt, by_position
from distgrow.growth.branching import Branched, Branching, Candidate, Verdict, largest_no_worse


class Learned(Branching):
    """The batch of the branch that validates best: b, k·b … of equal samples from the same state [D].

    The largest batch goes on whose validation loss exceeds that of no smaller one by more than `tolerance`. Evaluations
    of the validation set are forward passes and cost no gradient evaluations. η follows `lr.rule`.
    """

    kind: Literal["learned"] = "learned"
    goes_by: ClassVar[str] = "validation"
    cost: Annotated[float, Field(gt=0, le=4)] = 0.25
    """Share of the run's samples that branches may cost beside those that go on."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Validation loss, or `metric`, that a larger batch may be worse by; 0: the best goes on, of equals the larger."""
    stages_at_once: PosInt = 1
    """Stages of the largest branch above the run's own."""
    validation: str | None = None
    """Name of the test set whose loss decides, if there are several."""
    metric: str = "loss"
    """Its metric that decides."""
    mode: Literal["min", "max"] | None = None
    """Whether the least or the greatest value is best. The default is min for loss; another metric must say it."""

    @model_validator(mode="after")
    def _knows_which_is_better(self) -> "Learned":
        if self.metric != "loss" and self.mode is None:
            raise ConfigError(f"metric={self.metric} may be best if least or greatest: set mode to min or max")
        return self

    @property
    def losers(self) -> int:
        return self.stages_at_once

    @property
    def ahead(self) -> int:
        return self.stages_at_once

    @property
    def held(self) -> str:
        return f"growth.kind={self.name} finds no room for a test in the budget, or at growth.cap; raise them"

    def candidates(self, progress: Progress) -> tuple[Candidate, ...]:
        most = int(min(self.ahead, self.last_stage - progress.stage))
        return tuple(Candidate(stages=stages, state=dict(progress.policy)) for stages in range(most + 1))

    def verdict(self, results: Sequence[Branched]) -> Verdict:
        first, sign = results[0], -1 if self.mode == "max" else 1
        losses = [sign * first.validation]
        losses += [sign * r.validation if all(map(math.isfinite, r.losses)) else math.inf for r in results[1:]]
        winner = largest_no_worse(dict(enumerate(losses)), self.tolerance)
        differences = tuple(result.validation - first.validation for result in results)
        return Verdict(winner=winner, differences=differences, errors=(0.0,) * len(results))

    def validates(self) -> tuple[str | None, str]:
        return self.validation, self.metric

    def limits(self) -> Mapping[str, float]:
        return {"tolerance": self.tolerance, **({"greatest": 1.0} if self.mode == "max" else {})}


learned = by_position(Learned, "start", "cap", "factor")
