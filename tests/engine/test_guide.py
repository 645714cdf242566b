"""The guide's scripts run as they stand, and what its diffs make of plain DDP is what it says."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, ledger

GUIDE = (ROOT / "docs/guide.md").read_text()
SCRIPTS = dict(re.findall(r"```python title=\"(.*?)\"\n(.*?)```", GUIDE, re.S))
FITTED, LOOPED = re.findall(r"```diff\n(.*?)```", GUIDE, re.S)


def patched(script: str, diff: str) -> str:
    """A script with a diff's hunks, which @@ divides, each of which has to be found exactly once."""
    for hunk in diff.split("@@\n"):
        lines = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        old, new = ("".join(f"{text}\n" for sign, text in lines if sign in (" ", kept)) for kept in "-+")
        assert script.count(old) == 1, f"the guide's script does not have\n{old}"
        script = script.replace(old, new)
    return script


def run(script: str, folder: Path, workers: int = 1) -> str:
    """What a script prints in a folder of its own; alone it is a group of one rank, as torchrun would make it."""
    folder.mkdir()
    (folder / "train.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers > 1 else []
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone["MASTER_PORT"] = str(free.getsockname()[1])
    finished = subprocess.run(
        [sys.executable, *launcher, "train.py"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **(alone if workers == 1 else {})},
        check=False, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def flat(state: dict[str, Any]) -> torch.Tensor:
    """All parameters of a model's state, one vector, float64."""
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def trained(folder: Path) -> torch.Tensor:
    """The parameters that a script left: its own file, or the last checkpoint of its run."""
    if (folder / "model.pt").exists():
        return flat(torch.load(folder / "model.pt", weights_only=True))
    last = max((folder / "runs/mine/checkpoints").glob("step-*"))
    return flat(torch.load(last / "engine.pt", weights_only=True)["model"])


def test_python_that_no_test_runs_stands_in_neither_readme_nor_guide() -> None:
    assert "```python" not in (ROOT / "README.md").read_text()
    assert set(SCRIPTS) == {"train.py", "mine.py", "loop.py"}
    assert GUIDE.count("```python") == len(SCRIPTS)


@pytest.mark.parametrize("name", ["mine.py", "loop.py"])
def test_the_examples_without_ddp_run(name: str, tmp_path: Path) -> None:
    assert "Ledger(applied=12000, skipped=0" in run(SCRIPTS[name], tmp_path / "here")


def test_fit_and_a_loop_with_a_controller_end_with_the_same_parameters(tmp_path: Path) -> None:
    told = run(patched(SCRIPTS["train.py"], FITTED), tmp_path / "fitted")
    run(patched(SCRIPTS["train.py"], LOOPED), tmp_path / "looped")
    assert torch.equal(trained(tmp_path / "fitted"), trained(tmp_path / "looped"))
    counts = ledger(tmp_path / "fitted/runs/mine")
    assert counts["applied"] == 8 * 1797
    assert f"Ledger(applied={counts['applied']}, " in told
    steps = [json.loads(line) for line in (tmp_path / "fitted/runs/mine/metrics.jsonl").read_text().splitlines()]
    assert {step["batch"]: step["stage"] for step in reversed(steps) if step["event"] == "step"}.items() >= {
        (16, 0), (32, 1), (64, 2), (128, 3)
    }  # fmt: skip


@pytest.mark.slow
def test_under_torchrun_the_plain_script_trains_and_both_ways_agree_with_one_process(tmp_path: Path) -> None:
    scripts = {"fitted": patched(SCRIPTS["train.py"], FITTED), "looped": patched(SCRIPTS["train.py"], LOOPED)}
    run(SCRIPTS["train.py"], tmp_path / "plain", workers=2)
    assert torch.isfinite(trained(tmp_path / "plain")).all()
    run(scripts["fitted"], tmp_path / "alone")
    for name, script in scripts.items():
        run(script, tmp_path / name, workers=2)
        torch.testing.assert_close(trained(tmp_path / name), trained(tmp_path / "alone"), rtol=1e-5, atol=1e-6)
