"""The first batch for most of the budget, then growth in place of a decay."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Rule, Span
from distgrow.core.lr import Constant as ConstantRule
from distgrow.core.spec import at_least, by_position
from distgrow.core.stages import Listed, Stages, Trigger
from distgrow.growth.base import needs_samples
from distgrow.growth.objective import Aimed


class Late(Aimed):
    """b₀ for most of a known budget, then growth to the cap in equal stages: warm-up–stable–decay, growth for decay.

    After arXiv 2602.14208, whose decay phase of the learning rate it replaces. η is constant unless lr.rule says else.
    """

    kind: Literal["late"] = "late"
    sets_stages: ClassVar[bool] = True
    default_rule: ClassVar[Rule] = ConstantRule()
    hold: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Fraction of the budget that b₀ is held for."""

    def trigger(self, stages: Stages, lr: LR, span: Span) -> Trigger:
        self.needs_cap("grows to the cap by the end of the budget")
        needs_samples("growth.kind=late", span)
        count, rest = int(self.last_stage), (1 - self.hold) * span.samples
        if rest < count:
            raise ConfigError(
                f"growth.kind=late: {count} stages in the last {rest:.3g} samples of the budget would have less than "
                "one each; raise budget, or lower growth.hold or growth.cap"
            )
        first = self.hold * span.samples
        return Listed(axis="samples", ends=tuple(at_least(first + rest * m / count) for m in range(count)))


late = by_position(Late, "start", "cap", "factor", "hold")
