"""Signals that run.stop_signals names end a run with a checkpoint, however its ranks were started."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Commands, events, ledger, torchrun

LONG = ["growth={kind: constant, start: 8}", "budget={epochs: 300}", "run.log_every=20", "run.eval.every_epochs=1000"]
SCRIPT = """
import torch
from torch import nn
from distgrow import RunSpec, budget, constant, fit

data = torch.utils.data.TensorDataset(torch.randn(500, 4), torch.randn(500, 1))

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

if __name__ == "__main__":
    spec = RunSpec(dir="run", log_every=20, stop_signals=["SIGUSR1"])
    result = fit(nn.Linear(4, 1), loss, data, growth=constant(8), budget=budget(epochs=3000), run=spec)
    assert not result.finished
    print(f"stopped at {result.progress.step}\\n", end="", flush=True)  # whole, beside the other rank
"""


def signalled(commands: Commands, words: list[str], sent: signal.Signals, *, to: str = "one") -> tuple[int, str]:
    """The exit code and output of a command that gets a signal while it trains in the folder `run`.

    The signal goes `to` its first process, to its process group (as a terminal's Ctrl-C) or to all processes that it
    has started (as SLURM's, which follows a step's processes).
    """
    metrics = commands.folder / "run/metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, *words], cwd=commands.folder, env={**commands.environment, "PYTHONFAULTHANDLER": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240  # as other commands have
        while not (metrics.exists() and '"event": "step"' in metrics.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, where_it_stands(process)
            time.sleep(0.05)
        told = psutil.Process(process.pid).children(recursive=True) if to == "all" else []
        (os.killpg if to == "group" else os.kill)(process.pid, sent)
        for other in told:
            other.send_signal(sent)
        try:
            out, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            raise AssertionError(where_it_stands(process)) from None
    finally:
        process.kill()
    print(out)
    return process.returncode, out


def where_it_stands(process: "subprocess.Popen[str]") -> str:
    """End a process and all that it has started, and return its output with the lines that they were executing."""
    of_all = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    names = "\n".join(f"{each.pid} {each.status()} {' '.join(each.cmdline()[:8])}" for each in of_all)
    for each in reversed(of_all):  # faulthandler prints the stack of each
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGABRT)
    out, _ = process.communicate(timeout=30)
    return f"it waits in vain\n{names}\n{out}"


def train(*overrides: str) -> list[str]:
    return ["-m", "distgrow", "train", str(ROOT / "configs/digits.yaml"), *LONG, "run.dir=run", *overrides]


def assert_saved(run: Path) -> None:
    """The run ended once, by request, with a checkpoint of its last update and no evaluation made in vain."""
    (ended,) = events(run, "end")
    assert ended["reason"] == "stopped on request"
    assert events(run, "checkpoint")[-1]["step"] == ended["step"] > 0
    assert ledger(run) == {"applied": 8 * ended["step"], "skipped": 0, "replayed": 0, "discarded": 0, "probe": 0}


@pytest.mark.parametrize(
    ("sent", "workers"),
    [
        (signal.SIGUSR1, 2),
        (signal.SIGUSR2, 1),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, 2, marks=pytest.mark.slow),
    ],
)
def test_notices_of_slurm_reach_ranks_and_spare_their_loader_workers(
    distgrow: Commands, workers: int, sent: signal.Signals
) -> None:
    stop = [f"run.stop_signals=[{sent.name}]", f"launch.workers={workers}", "run.loader.workers=1"]
    code, out = signalled(distgrow, train(*stop), sent)
    assert code == 0, out
    assert "Traceback" not in out
    assert_saved(distgrow.folder / "run")


def test_a_signal_that_is_not_named_is_not_taken_for_a_request(distgrow: Commands) -> None:
    code, _ = signalled(distgrow, train(), signal.SIGUSR1)
    assert code == -signal.SIGUSR1
    assert not events(distgrow.folder / "run", "end")


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_with_loader_workers_saves_and_says_once_how_to_go_on(distgrow: Commands, workers: int) -> None:
    more = [f"launch.workers={workers}", "run.loader.workers=2"]
    code, out = signalled(distgrow, train(*more), signal.SIGINT, to="group")
    assert code == 130, out
    assert "Traceback" not in out
    assert "KeyboardInterrupt" not in out
    assert out.count("a second Ctrl-C ends it at once") == 1
    step = events(distgrow.folder / "run", "end")[0]["step"]
    assert out.count(f"distgrow: Ctrl-C: run.dir=run holds a checkpoint of step {step}; go on with --resume") == 1
    assert_saved(distgrow.folder / "run")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_fit_returns_after_a_signal_alone_and_under_a_torchrun_that_passes_it_on(
    distgrow: Commands, ranks: int
) -> None:
    (distgrow.folder / "mine.py").write_text(SCRIPT)
    module, *options = torchrun(2)[:-2]
    passing = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    launcher = ["-m", module, *options, *passing] if ranks == 2 else []
    code, out = signalled(distgrow, [*launcher, "mine.py"], signal.SIGUSR1)
    step = events(distgrow.folder / "run", "end")[0]["step"]
    assert out.count(f"stopped at {step}\n") == ranks
    assert code == (1 if ranks == 2 else 0)  # torchrun itself reports 1 after any signal
    assert_saved(distgrow.folder / "run")


def test_srun_around_torchrun_may_tell_agent_ranks_and_loader_workers_alike(distgrow: Commands) -> None:
    own = train("run.stop_signals=[SIGUSR1]", "run.loader.workers=1")
    words = ["-m", *torchrun(2)[:-2], "--signals-to-handle", "SIGTERM,SIGUSR1", *own]
    code, _ = signalled(distgrow, words, signal.SIGUSR1, to="all")
    assert code == 1
    assert_saved(distgrow.folder / "run")
