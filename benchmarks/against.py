"""Time updates of this checkout against those of another one, in turns: one process each, on one core."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from paired import Report, interleave, ratio

ROOT = Path(__file__).resolve().parent.parent
#: Runs in a checkout's own benchmarks folder: builds a case, then times one block for every line that it reads.
WORKER = """
import sys, tempfile
from pathlib import Path
import torch
from overhead import CASES, Constant, World, build, build_job, distgrow_block, joined
case = CASES["torch"][int(sys.argv[1])]
torch.set_num_threads(1)
with joined("cpu", alone=True) as world, tempfile.TemporaryDirectory() as folder:
    growth = Constant(start=case.engine.max_micro * case.accum)
    job = build_job(build(case.model), world, growth, engine=case.engine, folder=Path(folder))
    block = distgrow_block(job, case.updates, world)
    for _ in sys.stdin:
        print("seconds", block(), flush=True)
"""


class Other:
    """Hold a process that times blocks of one case with the code of a checkout."""

    def __init__(self, checkout: Path, case: int) -> None:
        paths = f"{checkout}:{checkout / 'benchmarks'}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(case)],
            cwd=checkout, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def block(self) -> float:
        """Return the seconds of one block."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = next(line for line in self.process.stdout if line.startswith("seconds "))
        return float(line.split()[1])

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def checked_out(revision: str, folder: Path) -> Path:
    """Return a folder with the files of a revision; a path is one already."""
    if Path(revision, "distgrow").is_dir():
        return Path(revision).resolve()
    files = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=files, check=True)
    return folder


def against(revision: str, cases: list[str], rounds: int) -> Report:
    """Return the table of update times here over those of another checkout."""
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        before = checked_out(revision, Path(folder))
        for case, name in enumerate(cases):
            here, there = Other(ROOT, case), Other(before, case)
            seconds = interleave({"here": here.block, "there": there.block}, rounds)
            here.close()
            there.close()
            times = [f"{median(seconds[side]) * 1e3:,.1f}" for side in ("here", "there")]
            rows.append([name, *times, str(ratio(seconds["here"], seconds["there"]))])
    return Report(
        title=f"Time of a block of updates, here over {revision}: median of paired ratios (quartiles)",
        columns=["model × accum", "here ms", f"{revision} ms", "ratio"],
        rows=rows,
    )
