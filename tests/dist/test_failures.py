"""What goes wrong while a run is under way ends in a clear message, and loses nothing."""

import json
import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Commands, events, ledger, parameters, torchrun
from test_resume import until_step

FAULTY = """
import os
import torch
from torch import nn
from torch.nn import functional as F

class Faulty:
    def __init__(self, poison, rank, kind):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(200, 5, generator=generator)
        self.poison, self.rank, self.kind = poison, rank, kind
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        if index in self.poison and int(os.environ.get("RANK", 0)) in self.rank:
            if self.kind == "raise":
                raise ArithmeticError(f"sample {index} is rotten")
            return self.x[index] * float("nan"), torch.tensor(0.0)
        return self.x[index], self.x[index].sum()

def make(poison=(), rank=(0, 1), kind="nan"):
    model = nn.Linear(5, 1)
    return model, lambda model, batch: F.mse_loss(model(batch[0]).squeeze(-1), batch[1]), Faulty(poison, rank, kind)
"""


@pytest.fixture
def faulty(distgrow: Commands) -> Commands:
    """A user's task whose samples can be made to fail."""
    (distgrow.folder / "faulty.py").write_text(FAULTY)
    return distgrow


def task(**args: object) -> tuple[str, ...]:
    """Overrides that train the faulty task."""
    return (f"task={{kind: target, target: 'faulty:make', args: {json.dumps(args)}}}", "model=null")


def working_in(folder: Path) -> list[str]:
    """Processes whose folder this is, by their ids: those that a test's command has started, forks among them."""
    found = list[str]()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if (process / "cwd").resolve() == folder.resolve():
                found.append(process.name)
    return found


def orphans(folder: Path) -> list[str]:
    """Processes that still work in a scratch folder after a moment in which they could end."""
    deadline = time.monotonic() + 5
    while (left := working_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_a_rank_that_was_left_behind_would_be_seen(distgrow: Commands) -> None:
    process = distgrow.start("train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=run", module=torchrun(2))
    until_step(distgrow.folder / "run", 1, process)
    process.kill()  # and not its ranks
    left = working_in(distgrow.folder)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert len(left) >= 2
    assert not orphans(distgrow.folder)


@pytest.mark.parametrize("launcher", ["one process", "torchrun", "local workers", "loader processes"])
def test_a_worker_that_raises_ends_the_run_with_its_error_first(faulty: Commands, launcher: str) -> None:
    run = str(faulty.folder / "run")
    extra = {"local workers": ("launch.workers=2",), "loader processes": ("run.loader.workers=2",)}.get(launcher, ())
    rank = (0,) if launcher in ("one process", "loader processes") else (1,)
    began = time.monotonic()
    arguments = (*task(poison=[50], rank=rank, kind="raise"), *extra)
    finished = faulty.train(run, *arguments, workers=2 if launcher == "torchrun" else 1)
    assert finished.code == 1
    assert "sample 50 is rotten" in finished.err
    first = next(line for line in finished.err.splitlines() if "Error" in line)
    assert "ArithmeticError" in first or "rotten" in first, finished.err
    assert time.monotonic() - began < 30 + 15  # fifteen seconds to start
    assert not orphans(faulty.folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_nan_on_one_rank_is_skipped_on_all_and_counted(faulty: Commands, workers: int) -> None:
    assert faulty.train("run", *task(poison=[7], rank=(0, 1)), workers=workers).code == 0
    skips, ends = events(faulty.folder / "run", "skip"), events(faulty.folder / "run", "end")
    counted = ledger(faulty.folder / "run")
    passes = (1500 + counted["skipped"]) / 200  # the rotten sample comes once in each pass
    assert math.floor(passes) <= len(skips) <= math.ceil(passes)
    assert counted["skipped"] == sum(skip["batch"] for skip in skips) > 0
    assert counted["applied"] == 1500
    assert ends[0]["sfo"] == 1500 + counted["skipped"]
    assert all(skip["grad_norm"] is None for skip in skips)
    assert parameters(faulty.folder / "run").isfinite().all()


def test_loader_processes_follow_when_a_skip_moves_the_plan(faulty: Commands) -> None:
    arguments = task(poison=[7])
    assert faulty.train("direct", *arguments).code == 0
    assert faulty.train("ahead", *arguments, "run.loader={workers: 2, prefetch: 8}").code == 0
    assert (parameters(faulty.folder / "direct") == parameters(faulty.folder / "ahead")).all()
    assert ledger(faulty.folder / "direct") == ledger(faulty.folder / "ahead")


def test_too_many_nans_in_a_row_stop_the_run_with_a_good_checkpoint(faulty: Commands) -> None:
    finished = faulty.train("run", *task(poison=list(range(200))), "run.max_skips=4")
    assert finished.code == 1
    assert "4 updates in a row were not finite" in finished.err
    assert "Traceback" not in finished.err
    assert ledger(faulty.folder / "run") == {
        "applied": 0, "skipped": 32, "replayed": 0, "discarded": 0, "probe": 0
    }  # fmt: skip
    assert parameters(faulty.folder / "run").isfinite().all()


def test_a_rank_ends_without_the_interpreters_finalisation_but_after_exit_handlers(distgrow: Commands) -> None:
    # where gloo's threads still drop a tensor while the interpreter is finalised, the process aborts
    (distgrow.folder / "lasting.py").write_text(
        """
import atexit
import threading
import torch
from torch import nn

class Lasting:
    def __del__(self):
        print("finalised", flush=True)

lasting = Lasting()
atexit.register(print, "exit handler")
threading.Timer(2, print, ["thread"]).start()

def make():
    return nn.Linear(3, 1), lambda model, batch: model(batch).square().mean(), torch.ones(50, 3)
"""
    )
    own = ("task={kind: target, target: 'lasting:make'}", "model=null")
    finished = distgrow.train("group", *own, workers=2)
    assert finished.code == 0, finished.err
    assert finished.out.count("exit handler") == finished.out.count("thread") == 2
    assert "finalised" not in finished.out
    distgrow.warm = False  # a process that Python ends
    assert "finalised" in distgrow.train("alone", *own).out


def test_two_processes_cannot_write_to_one_run_folder(distgrow: Commands) -> None:
    long = "budget={epochs: 1000}"
    process = distgrow.start("train", str(Path(__file__).parents[2] / "configs/digits.yaml"), "run.dir=run", long)
    try:
        deadline = time.monotonic() + 240
        while not (distgrow.folder / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = distgrow.train("run", resume=True)
        assert second.code == 2
        assert "being written by another process" in second.err
    finally:
        process.kill()
        process.communicate()


def test_a_run_folder_is_never_overwritten(distgrow: Commands) -> None:
    assert distgrow.train("run").code == 0
    before = (distgrow.folder / "run/metrics.jsonl").read_bytes()
    again = distgrow.train("run")
    assert again.code == 2
    assert "--resume" in again.err
    other = distgrow.train("run", "lr.base=0.2", "growth.cap=64", resume=True)
    assert other.code == 2
    assert "lr.base: 0.05 in the folder, 0.2 now" in other.err
    assert "growth.cap: 32 in the folder, 64 now" in other.err
    nothing = distgrow.train("elsewhere", resume=True)
    assert nothing.code == 2
    assert "no run to resume" in nothing.err and not (distgrow.folder / "elsewhere").exists()
    both = distgrow.train("elsewhere", "--auto-resume", resume=True)
    assert both.code == 2 and "--auto-resume alone also begins a run" in both.err
    assert (distgrow.folder / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("task={kind: cifar10, path: /nowhere}", "model=null"), "hf download"),
        (("task={kind: text, path: /nowhere}", "model=null"), "task.path=/nowhere"),
        (("task={kind: target, target: 'no_such:thing'}", "model=null"), "does not import"),
        (("task={kind: target, target: 'json:nothing'}", "model=null"), "has no function 'nothing'"),
        (("task={kind: target, target: 'platform:node'}", "model=null"), "it must return a distgrow.Task"),
        (("run.dir=/dev/null/run",), "/dev/null"),
        (("run.dir=/proc/nowhere",), "cannot write to /proc/nowhere"),
        (("model={kind: gpt}",), "needs task.kind=text"),
    ],
)
def test_bad_input_ends_with_a_message_and_code_2(distgrow: Commands, overrides: tuple[str, ...], told: str) -> None:
    finished = distgrow.train("run", *overrides)
    assert finished.code == 2, finished.err
    assert told in finished.err
    assert "Traceback" not in finished.err
    assert finished.err.startswith("distgrow: ")


def test_a_group_larger_than_the_batch_is_refused_on_one_line(distgrow: Commands) -> None:
    words = ["train", str(Path(__file__).parents[2] / "configs/digits.yaml"), "growth.start=2", "run.dir=run"]
    finished = distgrow(*words, module=torchrun(3))
    assert "batch=2 is smaller than world=3" in finished.err
    assert not (distgrow.folder / "run").exists()
