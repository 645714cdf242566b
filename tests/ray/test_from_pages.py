"""The Ray scripts of docs/from/ train on a cluster as the pages say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra 'ray'")

import test_ray
from conftest import ROOT, ledger
from hosts import RAY_COMMAND
from page_scripts import after, scripts

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
cluster = test_ray.cluster  # a Ray cluster of this one host, with a token


def run(script: str, folder: Path, cluster: dict[str, str]) -> None:
    """Run a script that starts a TorchTrainer, in a folder of its own."""
    folder.mkdir()
    (folder / "train.py").write_text(script)
    environment = {**os.environ, **cluster, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    finished = subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_a_torch_trainer_trains_before_and_after_the_pages_diff(tmp_path: Path, cluster: dict[str, str]) -> None:
    run(scripts("from/ray-train.md")["train.py"], tmp_path / "before", cluster)
    run(after("from/ray-train.md"), tmp_path / "after", cluster)
    assert ledger(tmp_path / "after/runs/digits")["applied"] == 4 * 1797


def test_an_own_project_is_submitted_from_its_folder(tmp_path: Path, cluster: dict[str, str]) -> None:
    page = (ROOT / "docs/from/own-project-on-ray.md").read_text()
    project = tmp_path / "project"
    project.mkdir()
    (project / "mytask.py").write_text(after("from/own-project-on-ray.md"))
    (project / "my.yaml").write_text(page.split('```yaml title="my.yaml"\n')[1].split("```")[0])
    submitted = subprocess.run(
        [RAY_COMMAND, "job", "submit", "--working-dir", ".", "--runtime-env-json",
         f'{{"env_vars": {{"PYTHONPATH": "{ROOT}"}}}}', "--", sys.executable, "-m", "distgrow", "train", "my.yaml",
         "launch.address=auto", f"run.dir={tmp_path / 'run'}"],
        cwd=project, env={**os.environ, **cluster, "RAY_ADDRESS": cluster["DASHBOARD"]},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert ledger(tmp_path / "run")["applied"] == 4 * 2000
