"""What faults and checkpoints cost: the seconds from a SIGKILLed worker to the next update, and the stall of saving.

    python benchmarks/recovery.py [--quick] [--markdown] [--jsonl FILE]

A worker of a local Ray (digits, two workers) is killed from outside while it trains, and what follows is watched from
outside: processes, and the lines of metrics.jsonl. Saving is measured on a small GPT at the default interval, in the
run's own `checkpoint` events, and by the updates that ran while a checkpoint was being written.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from paired import Report, Spread, arguments, keep, show, spread

ROOT = Path(__file__).resolve().parent.parent
RESTORE_LIMIT_S, STALL_LIMIT = 2.0, 0.05
MARK = "DISTGROW_BENCHMARK"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Seconds after a SIGKILL, over several runs."""

    detection: Spread  #: until Ray has ended the other workers
    restart: Spread  #: until a new group has started, imported and joined
    restore: Spread  #: reading, verifying and loading the checkpoint
    first: Spread  #: until the next update is applied
    total: Spread
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Hold what saving cost a run."""

    checkpoint_mb: float
    checkpoints: int
    seconds: float  #: of the run
    stalled: float  #: seconds in which training waited
    behind: float  #: seconds of the median checkpoint, of which most are behind the training
    slower: float  #: median update while one was written ÷ median update otherwise

    @property
    def share(self) -> float:
        """Return the share of the run's time."""
        return self.stalled / self.seconds


def start(folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    """`distgrow train` in `folder`, its processes recognisable by their environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(folder)}
    command = [sys.executable, "-m", "distgrow", "train", *words, f"run.dir={folder / 'run'}"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return all whole lines of the run's metrics so far."""
    path = folder / "run/metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def workers(folder: Path) -> list[psutil.Process]:
    """Return the Ray processes that train this run."""
    found = []
    for process in psutil.process_iter():
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()) and process.environ().get(MARK) == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def moment(condition: Any, timeout_s: float = 180) -> float:
    """Wait for a condition. Return the time at which it came true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the run did not come so far; try it by hand")
        time.sleep(0.02)
    return time.monotonic()


def recover_once() -> tuple[float, float, float, float]:
    """Kill a worker of a run, once: detection, restart, restore, first update."""
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        process = start(
            folder, str(ROOT / "configs/digits.yaml"), "budget={epochs: 100000}", "launch.kind=ray", "launch.workers=2",
            "launch.max_failures=1", "run.checkpoint.every_s=2", "growth={kind: constant, start: 32}",
        )  # fmt: skip
        try:
            moment(lambda: any(line["event"] == "checkpoint" and line["step"] > 0 for line in lines(folder)))
            group = workers(folder)
            began = time.monotonic()
            group[-1].kill()
            gone = moment(lambda: not any(worker.is_running() for worker in group))
            resumed = moment(lambda: any(line["event"] == "resume" for line in lines(folder)))
            restore = next(line for line in lines(folder) if line["event"] == "resume")["restore_s"]
            first = moment(lambda: _stepped_after_resume(lines(folder)))
        finally:
            process.terminate()
            process.wait(timeout=120)
    return gone - began, resumed - gone - restore, restore, first - resumed


def _stepped_after_resume(events: list[dict[str, Any]]) -> bool:
    kinds = [event["event"] for event in events]
    return "step" in kinds[kinds.index("resume") :]


def recover(runs: int) -> Recovery:
    """Kill a worker in several runs."""
    parts = [recover_once() for _ in range(runs)]
    detection, restart, restore, first = (spread([part[k] for part in parts]) for k in range(4))
    total = spread([sum(part) for part in parts])
    return Recovery(detection=detection, restart=restart, restore=restore, first=first, total=total, runs=runs)


def stall(seconds: float, every_s: float) -> Stall:
    """Train the small GPT for about so many seconds, with a checkpoint each `every_s`."""
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        process = start(
            folder, str(ROOT / "configs/text.yaml"), "budget={epochs: 1000}", f"run.checkpoint.every_s={every_s}",
            "growth={kind: constant, start: 16}", "lr.decay={kind: none}", "run.eval.every_epochs=1000",
        )  # fmt: skip
        try:
            moment(lambda: any(line.get("time_s", 0) > seconds for line in lines(folder)), seconds + 120)
        finally:
            process.terminate()
            process.wait(timeout=120)
        last = max((folder / "run/checkpoints").iterdir())
        size = sum(file.stat().st_size for file in last.iterdir())
        return summary(lines(folder), size)


def summary(events: list[dict[str, Any]], size: int) -> Stall:
    """Return the cost of saving, from a run's own events."""
    saved = [event for event in events if event["event"] == "checkpoint"]
    written = [(event["time_s"] - event["seconds"], event["time_s"]) for event in saved]
    during, otherwise = list[float](), list[float]()
    for step in (event for event in events if event["event"] == "step"):
        inside = any(begin < step["time_s"] <= end for begin, end in written)
        (during if inside else otherwise).append(step["batch"] / step["samples_per_s"])
    slower = statistics.median(during) / statistics.median(otherwise) if during else 1.0
    return Stall(
        checkpoint_mb=size / 1e6,
        checkpoints=len(saved),
        seconds=max(event["time_s"] for event in events),
        stalled=sum(event["stall_s"] for event in saved),
        behind=statistics.median(event["seconds"] for event in saved),
        slower=slower,
    )


def reports(recovery: Recovery, stalls: dict[float, Stall]) -> list[Report]:
    """Return the tables."""
    met = "met" if recovery.restore.median <= RESTORE_LIMIT_S else "missed"
    return [
        Report(
            title=f"Seconds from SIGKILL of one of two workers of a local Ray, digits, {recovery.runs} runs",
            columns=["detection", "group restart", "restore", "first update", "in all", "target"],
            rows=[
                [
                    *map(str, (recovery.detection, recovery.restart, recovery.restore, recovery.first, recovery.total)),
                    f"restore ≤ {RESTORE_LIMIT_S:g} s {met}",
                ]
            ],
        ),
        Report(
            title="Seconds that training waited for checkpoints, small GPT, one process",
            columns=["interval s", "MB", "written", "run s", "waited s", "of the run", "each s", "updates", "target"],
            rows=[stall_cells(every_s, row) for every_s, row in stalls.items()],
        ),
    ]


def stall_cells(every_s: float, row: Stall) -> list[str]:
    """Return a row of the table of checkpoints that were made each `every_s`."""
    return [
        f"{every_s:g}", f"{row.checkpoint_mb:.1f}", str(row.checkpoints), f"{row.seconds:.0f}",
        f"{row.stalled:.2f}", f"{row.share:.2%}", f"{row.behind:.3f}", f"× {row.slower:.2f}",
        f"≤ {STALL_LIMIT:.0%} {'met' if row.share <= STALL_LIMIT else 'missed'}",
    ]  # fmt: skip


def main() -> None:
    """Measure, keep, show."""
    options = arguments(__doc__, "two kills, short runs of the GPT").parse_args()
    recovery = recover(2 if options.quick else 7)
    plans = {60.0: 10.0, 2.0: 10.0} if options.quick else {60.0: 190.0, 2.0: 60.0}
    stalls = {every_s: stall(seconds, every_s) for every_s, seconds in plans.items()}
    if options.jsonl:
        keep(options.jsonl, [recovery, *stalls.values()])
    show(reports(recovery, stalls), markdown=options.markdown)


if __name__ == "__main__":
    main()
