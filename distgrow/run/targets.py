"""Targets: where a command is to write its results, checked before it measures anything; knows no command."""

import tempfile
from pathlib import Path

from distgrow.core.errors import RunError
from distgrow.run.folder import storing


def key_of(out: object | None) -> str:
    """Return the key or option that names the folder of results: `--out`, or if that is not given, `run.dir`."""
    return "run.dir" if out is None else "--out"


def check_folder(folder: Path, key: str) -> None:
    """Make a folder for results, and check that files can be made in it.

    Args:
        folder: The folder.
        key: The key of a config, or the option of a command, that names it.

    Raises:
        RunError: They cannot.
    """
    with storing(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def check_new_file(file: Path, option: str) -> None:
    """Check that a file can be written and is not there. It is not there afterwards either.

    Raises:
        RunError: It cannot, or is.
    """
    write_new_file(file, "", option)
    file.unlink()


def write_new_file(file: Path, text: str, option: str) -> None:
    """Write a file that must not be there, whoever has made it.

    Args:
        file: The file.
        text: What it is to hold.
        option: The option of a command that names it.

    Raises:
        RunError: It is there, or cannot be written.
    """
    with storing(file, option):
        try:
            with file.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except FileExistsError:
            raise RunError(
                f"{option}={file} exists already and is never overwritten: choose another file, or move this one away"
            ) from None
