"""The scaling benchmark: what it counts is really sent, decisions take as many calls anywhere; all of it, quick."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from scale_planning import AXES, UPDATE, Place, parts, peak
from scale_ranks import bytes_sent


def test_the_bytes_counted_are_those_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        with theirs:
            before = bytes_sent()
            for count in (1, 70_000):
                ours.sendall(b"x" * count)
                received = 0
                while received < count:
                    received += len(theirs.recv(2**16))
            assert bytes_sent() - before == 70_001


def calls(action: Callable[[], Any]) -> int:
    """Count the functions that are called. What is found once a stage has been found by a call before."""
    action()
    found = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        found[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return found[0]


ENDS = [(axis, growth) for axis in ("world", "step", "samples") for growth in ("exponential", "noise scale", "auto")]


@pytest.mark.parametrize(("axis", "growth"), [*ENDS, ("stages", "steps")])
def test_a_decision_takes_no_more_calls_and_memory_at_the_far_end_of_an_axis(axis: str, growth: str) -> None:
    """So 10⁵ ranks, 10⁸ updates, 10¹² samples and 10⁵ stages cost what few do."""
    points = AXES[axis][1], AXES[axis][-1]
    near, far = (parts(Place(axis=axis, at=at, growth=growth, **{axis: at}))[UPDATE] for at in points)
    assert calls(far) <= calls(near)
    assert peak(far) <= peak(near) + 512


@pytest.mark.slow
def test_the_whole_benchmark_runs_from_the_command_line(tmp_path: Path) -> None:
    rows, options = tmp_path / "rows.jsonl", ("--quick", "--markdown", "--jsonl", "rows.jsonl", "--plots", ".")
    command = [sys.executable, str(ROOT / "benchmarks/scale.py"), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| --- |") == 5
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["benchmark"] for row in found} == {"Throughput", "Traffic", "Cost", "Simulated"}
    for row in (row for row in found if row["benchmark"] == "Traffic"):
        whole = 2 * (row["world"] - 1) / row["world"] * row["parameters"] * 4
        assert whole <= row["most"] and row["least"] <= 1.1 * whole, row
    assert {file.name for file in tmp_path.glob("*.png")} == {"scale-planning.png", "scale-bytes.png"}
