"""A small /dev/shm, as containers have, ends a run with a message once the batch has outgrown it."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Commands, Finished, events, ledger

ROW_KIB = 64
TASK = """
import torch
from torch import nn

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 500
    def __getitem__(self, index):
        return torch.full((16384,), index / 500), torch.tensor(index % 2.0)

def loss(model, batch):
    return (model(batch[0]).squeeze(1) - batch[1]).square().mean()

def make():
    return nn.Linear(16384, 1), loss, Rows()
"""
WORDS = ["task={kind: target, target: 'large:make'}", "model=null", "lr.base=1e-5", "growth.factor=4", "growth.cap=128",
         "run.loader={workers: 2, prefetch: 3}", "run.checkpoint.every_steps=4", "run.dir=run"]  # fmt: skip


def with_shared_memory(commands: Commands, size_kib: int, *overrides: str) -> Finished:
    """`distgrow train` of large rows, in a mount namespace whose /dev/shm holds so much."""
    (commands.folder / "large.py").write_text(TASK)
    train = [sys.executable, "-m", "distgrow", "train", str(ROOT / "configs/digits.yaml"), *TINY, *WORDS, *overrides]
    mount = f'mount -t tmpfs -o size={size_kib}k tmpfs /dev/shm && exec "$@"'
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small /dev/shm")
    ran = subprocess.run(
        ["unshare", "-m", "bash", "-c", mount, "bash", *train], cwd=commands.folder, env=commands.environment,
        text=True, capture_output=True, check=False, timeout=200,
    )  # fmt: skip
    print(ran.stdout, ran.stderr)
    return Finished(ran.returncode, ran.stdout, ran.stderr)


def assert_told(finished: Finished, *words: str) -> None:
    assert finished.code == 1, finished.err
    assert "Traceback" not in finished.err
    (told,) = [line for line in finished.err.splitlines() if "/dev/shm" in line]
    for word in words:
        assert word in told


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_batch_that_outgrows_shared_memory_is_told_with_keys_and_size(distgrow: Commands, ranks: int) -> None:
    rows_in_flight = 2 * 3 * 8 + 16  # of all loader processes while the batch is 8, and some that are in use
    size = rows_in_flight * ROW_KIB
    finished = with_shared_memory(distgrow, size, f"launch.workers={ranks}")
    assert_told(finished, f"({size / 1024:.1f} MiB)", "run.loader.workers=2", "run.loader.prefetch=3", "--resume")
    run = distgrow.folder / "run"
    assert {line["batch"] for line in events(run, "step")} >= {8}
    assert events(run, "checkpoint")
    resumed = distgrow("train", str(ROOT / "configs/digits.yaml"), *TINY, *WORDS, "--resume")
    assert resumed.code == 0
    assert ledger(run)["applied"] == 1500


def test_shared_memory_that_holds_no_row_is_told_before_the_run_has_a_folder(distgrow: Commands) -> None:
    finished = with_shared_memory(distgrow, ROW_KIB)
    assert_told(finished, "before the run begins", "run.loader.workers=0")
    assert not (distgrow.folder / "run").exists()
    assert with_shared_memory(distgrow, ROW_KIB, "run.loader.workers=0", "budget.samples=100").code == 0


@pytest.mark.slow
def test_the_check_of_the_loss_takes_no_more_of_it_than_a_run(distgrow: Commands, tmp_path: Path) -> None:
    size = 4 * 8 * ROW_KIB  # the check looks at several times as many rows
    finished = with_shared_memory(
        distgrow, size, "growth={kind: constant, start: 2}", "run.loader={workers: 1, prefetch: 1}", "budget.samples=20"
    )
    assert finished.code == 0, finished.err
    assert (tmp_path / "run").exists()
