"""ResumeMode: whether a command begins a run or goes on with one."""

from collections.abc import Callable
from enum import StrEnum

from distgrow.core.errors import ConfigError


class ResumeMode(StrEnum):
    """Say whether a run is begun or resumed."""

    START = "start"
    """Begin a run. The folder must hold none."""
    CONTINUE = "continue"
    """Resume the run that the folder holds."""
    EITHER = "either"
    """Resume the run that the folder holds. Begin one if it holds none."""

    @classmethod
    def of(cls, resume: "Resume") -> "ResumeMode":
        """Return the mode that an argument `resume` stands for.

        Raises:
            ConfigError: It stands for none.
        """
        try:
            return cls(resume) if isinstance(resume, str) else _MODES[resume]
        except (ValueError, KeyError, TypeError):
            allowed = "True (resume), False (begin) or None (resume if the folder holds a run, else begin)"
            raise ConfigError(f"resume={resume!r}: allowed is {allowed}") from None

    def check_rebudget(self, rebudget: bool) -> None:
        """Raise ConfigError if a run that is begun is to have a budget in place of its own."""
        if rebudget and self is ResumeMode.START:
            raise ConfigError("--rebudget is for a run that goes on; give --resume too, or leave it out")

    def resumes(self, begun: Callable[[], bool]) -> bool:
        """Return whether the run is resumed. `begun` says whether the folder holds one; only EITHER asks."""
        return begun() if self is ResumeMode.EITHER else self is ResumeMode.CONTINUE


#: What Python callers give: True continues, False starts, None does either.
Resume = ResumeMode | bool | None

_MODES = {True: ResumeMode.CONTINUE, False: ResumeMode.START, None: ResumeMode.EITHER}
