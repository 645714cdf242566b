"""The scripts of the guide and of "From plain DDP" run as they stand, and their diffs do what the pages say."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, events, ledger
from page_scripts import after, alone, diffs, execute, flat, scripts

GUIDE = scripts("guide.md")


def launched(script: str, folder: Path, workers: int) -> None:
    """Run a script under torchrun, in a folder of its own."""
    folder.mkdir()
    (folder / "train.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = warm.run([sys.executable, *launcher, "train.py"], environment, folder, timeout_s=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def trained(folder: Path) -> torch.Tensor:
    """Return the parameters that a script left: its own file, or the last checkpoint of its run."""
    if (folder / "model.pt").exists():
        return flat(torch.load(folder / "model.pt", weights_only=True))
    last = max((folder / "runs/mine/checkpoints").glob("step-*"))
    return flat(torch.load(last / "engine.pt", weights_only=True)["model"])


def test_python_that_no_test_runs_stands_in_neither_readme_nor_guide() -> None:
    assert "```python" not in (ROOT / "README.md").read_text()
    assert set(GUIDE) == {"mine.py", "loop.py"}
    assert (ROOT / "docs/guide.md").read_text().count("```python") == len(GUIDE)


@pytest.mark.parametrize("name", ["mine.py", "loop.py"])
def test_the_guides_examples_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(GUIDE[name], tmp_path)
    assert "Ledger(applied=12000, skipped=0" in capsys.readouterr().out


def test_a_policy_of_ones_own_grows_only_once_the_loss_has_not_fallen_for_its_patience(tmp_path: Path) -> None:
    names = execute(scripts("policies.md")["patient.py"], tmp_path)
    lowest, waited, grown = math.inf, 0, 0
    for step in events(tmp_path / "runs/patient", "step"):
        if step["stage"] > grown:
            assert waited >= names["Patient"]().patience
            grown, waited = step["stage"], 0
        lowest, waited = min(lowest, step["loss"]), 0 if step["loss"] < lowest else waited + 1
    assert grown == names["result"].progress.stage > 0


def test_fit_and_a_loop_with_a_controller_end_with_the_same_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(after("from/ddp.md", 0), tmp_path / "fitted")
    alone(monkeypatch)
    execute(after("from/ddp.md", 1), tmp_path / "looped")
    assert torch.equal(trained(tmp_path / "fitted"), trained(tmp_path / "looped"))
    run = tmp_path / "fitted/runs/mine"
    assert ledger(run)["applied"] == 4 * 1797
    assert {(step["batch"], step["stage"]) for step in events(run, "step")} >= {(16, 0), (32, 1), (64, 2), (128, 3)}


def test_a_controller_in_an_own_loop_with_fully_shard_ends_with_one_processs_parameters_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = after("from/fsdp.md")
    assert len([line for line in diffs("from/fsdp.md")[0].splitlines() if line.startswith("+")]) < 40
    launched(script, tmp_path / "two", workers=2)
    alone(monkeypatch)
    execute(script, tmp_path / "one")
    torch.testing.assert_close(trained(tmp_path / "one"), trained(tmp_path / "two"), rtol=1e-4, atol=1e-5)
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert int(told[-1][1]) > int(told[0][1]) >= 16  # the batch has grown


@pytest.mark.slow
def test_under_torchrun_the_plain_script_trains_and_both_ways_agree_with_one_process(tmp_path: Path) -> None:
    launched(scripts("from/ddp.md")["train.py"], tmp_path / "plain", workers=2)
    assert torch.isfinite(trained(tmp_path / "plain")).all()
    execute(after("from/ddp.md", 0), tmp_path / "alone")
    for number, name in enumerate(("fitted", "looped")):
        launched(after("from/ddp.md", number), tmp_path / name, workers=2)
        torch.testing.assert_close(trained(tmp_path / name), trained(tmp_path / "alone"), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "fitted/runs/mine/metrics.jsonl").read_text().splitlines()[0])["world"] == 2
