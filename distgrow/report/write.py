"""The report of runs: plots and one HTML page, made from what their folders hold; knows no torch and no training."""

from pathlib import Path

from distgrow.core.errors import RunError
from distgrow.report.page import page
from distgrow.report.planned import Foresee
from distgrow.report.plots import paint
from distgrow.report.runs import read


def write(runs: list[str], out: str | None, foresee: Foresee = lambda _: None, update_s: float | None = None) -> str:
    """Plot runs together and describe each; the text names the files written.

    The files go into `out`, or where that is None into the first run's folder. `foresee` tells each run's plan, and
    `update_s` the seconds of an update, whatever its batch. ConfigError where a run cannot be read, RunError where the
    files cannot be written.
    """
    records = read(runs)
    folder = Path(runs[0] if out is None else out)
    plots = paint(records)
    whole = page(records, plots, [foresee(record) for record in records], update_s)
    files = {**plots, "report.html": whole.encode(errors="replace")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        reason = f"cannot write to {error.filename or folder}: {error.strerror}"
        raise RunError(f"{reason}; name a folder that can be written with --out") from error
    return "\n".join(["wrote", *(f"  {folder / name}" for name in files)])
