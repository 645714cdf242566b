"""The report of runs: plots and one HTML page, made from what their folders hold; knows no torch and no training."""

import io
from pathlib import Path

from distgrow.report.page import page
from distgrow.report.plots import AXES, draw
from distgrow.report.runs import Record, read
from distgrow.run import RunError


def write(runs: list[str], out: str | None) -> str:
    """Plot runs together and describe each; the text names the files written.

    The files go into `out`, or where that is None into the first run's folder. ConfigError where a run cannot be
    read, RunError where the files cannot be written.
    """
    records = read(runs)
    folder = Path(runs[0] if out is None else out)
    plots = {axis.file: _png(records, key) for key, axis in AXES.items()}
    files = {**plots, "report.html": page(records, plots).encode(errors="replace")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        reason = f"cannot write to {error.filename or folder}: {error.strerror}"
        raise RunError(f"{reason}; name a folder that can be written with --out") from error
    return "\n".join(["wrote", *(f"  {folder / name}" for name in files)])


def _png(records: list[Record], axis: str) -> bytes:
    file = io.BytesIO()
    draw(records, axis).savefig(file, format="png")
    return file.getvalue()
