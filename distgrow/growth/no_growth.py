"""no_growth(): what to say of a schedule that the budget ends before the batch can grow."""

from distgrow.core.progress import Progress
from distgrow.growth.controller import Controller


def no_growth(controller: Controller) -> str | None:
    """Return a sentence, if growth that has more than one stage cannot leave its first; else None."""
    if controller.growth.last_stage == 0 or any(stage for stage, _, _ in controller.outline(Progress(), soonest=True)):
        return None
    return f"the batch never grows: {controller.growth.held}"
