"""ResizeRequest: what a group of ranks leaves for the one of another size that follows it; a file in the run's folder.

The group that ends *asks*, whoever starts groups *takes* the request, the group that begins *answers* it. A request
that is damaged is still a request: all that is lost with it is how long the change took.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from distgrow.run.folder import RunFolder, storing


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeRequest:
    """A request for a group of another size."""

    old: int  #: ranks of the group that asked
    asked_at: float  #: seconds since the epoch
    time_s: float  #: seconds that the run had taken by then

    @property
    def seconds(self) -> float:
        """Seconds since it was asked; clocks of several hosts may disagree a little."""
        return max(0.0, time.time() - self.asked_at)


def ask(folder: RunFolder, request: ResizeRequest) -> None:
    """Leave the request, whole or not at all."""
    partial = folder.path / ".resize-partial"
    with storing(folder.path):
        partial.write_text(json.dumps(asdict(request)), encoding="utf-8")
        partial.replace(_asked(folder))


def take(folder: RunFolder) -> bool:
    """Return whether the group that has ended asked for another; the next group has the request to answer."""
    with storing(folder.path):
        if not _asked(folder).exists():
            return False
        _asked(folder).replace(_taken(folder))
    return True


def pending(folder: RunFolder) -> bool:
    """Return whether a group has ended and the next one has not begun: all is saved, nobody trains."""
    return _asked(folder).exists() or _taken(folder).exists()


def answered(folder: RunFolder) -> ResizeRequest | None:
    """Return the request that this group answers by beginning. None: there is none, or it is damaged."""
    try:
        values = json.loads(_taken(folder).read_text(encoding="utf-8"))
        return ResizeRequest(old=int(values["old"]), asked_at=float(values["asked_at"]), time_s=float(values["time_s"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    finally:
        _taken(folder).unlink(missing_ok=True)


def forget(folder: RunFolder) -> None:
    """Drop requests that nobody answered: their run was killed, and begins anew with what its stage wants."""
    _asked(folder).unlink(missing_ok=True)
    _taken(folder).unlink(missing_ok=True)


def _asked(folder: RunFolder) -> Path:
    return folder.path / ".resize-asked"


def _taken(folder: RunFolder) -> Path:
    return folder.path / ".resize-taken"
