"""The report of runs: plots and one HTML page, made from what their folders hold; knows no torch and no training."""

from pathlib import Path

from distgrow.core.errors import RunError
from distgrow.report.page import page
from distgrow.report.planned import Foresee
from distgrow.report.plots import AXES, paint
from distgrow.report.runs import read


def write(runs: list[str], out: str | None, foresee: Foresee = lambda _: None, update_s: float | None = None) -> str:
    """Plot runs together and describe each; return a text that names the files written.

    Args:
        runs: run folders.
        out: the folder for the files; None: the first run's.
        foresee: returns each run's plan.
        update_s: seconds of an update, whatever its batch, to compare by.

    Raises:
        ConfigError: a run cannot be read.
        RunError: the files cannot be written.
    """
    records = read(runs)
    folder = Path(runs[0] if out is None else out)
    plots = paint(records)
    whole = page(records, plots, [foresee(record) for record in records], update_s)
    files = {AXES[key].file: plot.png for key, plot in plots.items()}
    files["report.html"] = whole.encode(errors="replace")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        reason = f"cannot write to {error.filename or folder}: {error.strerror}"
        raise RunError(f"{reason}; name a folder that can be written with --out") from error
    return "\n".join(["wrote", *(f"  {folder / name}" for name in files)])
