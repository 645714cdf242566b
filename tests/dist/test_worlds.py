"""The same run over different worlds, micro-batches and launchers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import ROOT, Commands, agent, events, free_port, in_ranks, ledger, parameters


def spy_package(folder: Path) -> None:
    """A user's own package outside the repository: a small model, and a loss that notes the rows it trains on."""
    package = folder / "spies"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "task.py").write_text(
        """
import os
import torch
from torch import nn
from torch.nn import functional as F

class Rows:
    def __init__(self, rows=200):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        self.y = self.x @ torch.arange(5.0, dtype=torch.float64) + torch.randn(rows, generator=generator)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index], self.y[index] + 0.1 * torch.randn(()), index

def make(log):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(model, batch):
        if model.training:  # which it is not in the check of the loss before a run
            with open(f"{log}.{os.environ.get('RANK', 0)}", "a") as file:
                file.writelines(f"{index}\\n" for index in batch[2].tolist())
        return F.mse_loss(model(batch[0]).squeeze(-1), batch[1])

    return model, loss, Rows()
"""
    )


def spied(distgrow: Commands, run: str, *overrides: str, workers: int = 1) -> list[int]:
    """Train the user's own task; the sample ids that were consumed, sorted."""
    code = distgrow.train(
        run,
        "task={kind: target, target: 'spies.task:make', args: {log: " + run + ".log}}",
        "model=null",
        "engine.precision=float64",
        "budget={samples: 600}",
        *overrides,
        workers=workers,
    )
    assert code.code == 0, code.err
    return sorted(int(i) for f in distgrow.folder.glob(f"{run}.log.*") for i in f.read_text().split())


def test_worlds_and_micro_batches_give_the_same_parameters_samples_and_ledger(distgrow: Commands) -> None:
    spy_package(distgrow.folder)
    consumed = spied(distgrow, "one")
    assert consumed == sorted(list(range(200)) * 3)  # three epochs, each sample once in each
    for run, workers, max_micro in [("two", 2, 64), ("three", 3, 5), ("four", 4, 2), ("small", 1, 3)]:
        assert spied(distgrow, run, f"engine.max_micro={max_micro}", workers=workers) == consumed
        one, other = parameters(distgrow.folder / "one"), parameters(distgrow.folder / run)
        assert (one - other).norm() <= 1e-10 * one.norm(), run
        assert ledger(distgrow.folder / run) == ledger(distgrow.folder / "one")
        assert {step["world"] for step in events(distgrow.folder / run, "step")} == {workers}


def test_local_workers_are_the_same_as_torchrun(distgrow: Commands) -> None:
    distgrow.warm = False
    assert distgrow.train("torchrun", workers=2).code == 0
    assert distgrow.train("local", "launch.workers=2").code == 0
    assert (parameters(distgrow.folder / "torchrun") == parameters(distgrow.folder / "local")).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(distgrow: Commands, workers: int) -> None:
    assert distgrow.train("direct", workers=workers).code == 0
    assert distgrow.train("ahead", "run.loader.workers=2", workers=workers).code == 0
    assert (parameters(distgrow.folder / "direct") == parameters(distgrow.folder / "ahead")).all()


def test_every_step_line_is_what_the_design_promises(distgrow: Commands) -> None:
    assert distgrow.train("run", workers=2).code == 0
    steps = events(distgrow.folder / "run", "step")
    keys = "step samples epoch stage batch micro accum world lr loss grad_norm grad_sq noise_trace noise_scale sfo "
    keys += "sfo_applied sfo_skipped sfo_replayed sfo_discarded sfo_probe time_s samples_per_s event"
    assert all(set(step) == set(keys.split()) for step in steps)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert [step["sfo"] for step in steps] == [sum(s["batch"] for s in steps[: k + 1]) for k in range(len(steps))]
    assert all(step["world"] * step["micro"] * step["accum"] >= step["batch"] for step in steps)
    assert steps[-1]["sfo_applied"] == 1500
    assert "NaN" not in (distgrow.folder / "run/metrics.jsonl").read_text()
    assert json.loads((distgrow.folder / "run/metrics.jsonl").read_text().splitlines()[-1])["event"] == "end"


@pytest.mark.parametrize("engine", [pytest.param("zero 1", marks=pytest.mark.slow), "torch"])
@pytest.mark.parametrize(("how", "own", "mean"), [("batch", 28, "25 and 0.1"), ("lr", 22, "22 and 0.075")])
def test_ranks_that_have_not_decided_alike_stop_all_of_them(
    engine: str, how: str, own: int, mean: str, tmp_path: Path
) -> None:
    if engine != "torch":
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    in_ranks("at_odds.py", str(tmp_path), engine, how, workers=2)
    first, second = ((tmp_path / f"told.{rank}").read_text() for rank in range(2))
    told = f"the mean over ranks is {mean}: they have not decided alike; go on with --resume"
    assert first == f"rank 0 is at batch 22 and lr 0.1, where {told}"
    assert second == f"rank 1 is at batch {own} and lr {0.1 if how == 'batch' else 0.05}, where {told}"


def test_a_rank_without_memory_for_its_notes_is_seen_by_all(tmp_path: Path) -> None:
    in_ranks("at_odds.py", str(tmp_path), "torch", "memory", workers=2)
    told = [(tmp_path / f"told.{rank}").read_text() for rank in range(2)]
    assert told == ["applied False, out of memory True, as before True"] * 2


def test_a_parameter_without_a_gradient_later_on_is_told(tmp_path: Path) -> None:
    in_ranks("at_odds.py", str(tmp_path), "torch", "layer", workers=2)
    for rank in range(2):
        assert (tmp_path / f"told.{rank}").read_text().startswith("the loss did not depend on all parameters in this")


def test_unlike_machines_take_the_mean_of_what_each_of_them_has_computed(tmp_path: Path) -> None:
    in_ranks("at_odds.py", str(tmp_path), "unlike", workers=2)
    assert [(tmp_path / f"told.{rank}").read_text() for rank in range(2)] == ["False [0.5, 1.0]"] * 2


LATE_DEATH = str(ROOT / "tests/dist/late_death.py")


@pytest.mark.parametrize("who", ["0", "1"])
def test_a_rank_that_dies_before_it_joins_does_not_keep_the_next_attempt_from_its_group(who: str) -> None:
    command = [sys.executable, "-m", *agent(2), "--max-restarts", "1", LATE_DEATH, who]
    finished = warm.run(command, {**os.environ, "OMP_NUM_THREADS": "1"}, timeout_s=100)
    assert finished.returncode == 0, finished.stderr


def test_agents_that_count_attempts_differently_bring_their_ranks_together() -> None:
    # only the agent whose rank has died counts an attempt
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--nnodes", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--max-restarts", "2", LATE_DEATH, "none"]
    hosts = [
        subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "DIES": dies}, stderr=subprocess.PIPE)
        for dies in ("0", "1")
    ]
    try:
        ends = [host.communicate(timeout=200)[1].decode() for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(ends)
