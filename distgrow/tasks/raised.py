"""What a user's own code raised, as a message that points at his lines; knows no task."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distgrow.core.errors import ConfigError

#: Lines of the user's that are shown, at most: the innermost ones.
SHOWN = 3
_OURS = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@contextmanager
def told_as(what: str) -> Iterator[None]:
    """Turn what a user's code raises into a ConfigError: what raised it, the exception, and the user's lines.

    A ConfigError of the user's own stays as it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        lines = "".join(f"\n  {line}" for line in _lines(error))
        raise ConfigError(f"{what} {reason}{'; mend it there:' if lines else ''}{lines}") from error


def _lines(error: BaseException) -> list[str]:
    """Return the innermost lines of the user's files that an exception came through, each with its place."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    places = [f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in frames[-SHOWN:]]
    if isinstance(error, SyntaxError) and error.filename:
        places.append(f"{error.filename}:{error.lineno}: {(error.text or '').strip()}")
    return places


def _is_users(file: str) -> bool:
    """Return whether a file is neither ours nor a library's."""
    path = Path(file)
    if not path.is_file():
        return False
    path = path.resolve()
    return not path.is_relative_to(_OURS) and not any(path.is_relative_to(folder) for folder in _LIBRARIES)
