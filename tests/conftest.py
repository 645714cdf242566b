"""What all tests share: a command line in its own process, runs to compare, and guards against leaks."""

import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import warm
from hypothesis import settings

# Two test processes share two cores (make test): with two threads each, tests of small models take up to six times
# as long. torch reads this when it is first imported, which happens in the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch.compile otherwise keeps a pool of threads, or of processes if it is ready first, which looks like a leak.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# A shell that starts tests in the background (make test-slow) lets them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("here", deadline=None)  # a busy machine falsifies nothing
settings.load_profile("ci" if "CI" in os.environ else "here")

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "growth={kind: exponential, start: 8, factor: 2, cap: 32}",
    "stages={every: {samples: 300}}",
    "budget={samples: 1500}",
    "run.eval.every_epochs=100",
]


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str


class Commands:
    """`distgrow …` in processes of their own, with one thread each, from a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warm = True  # forks of a process that has loaded torch; False for tests of the start itself
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        }

    def start(self, *words: str, module: tuple[str, ...] = ("distgrow",)) -> "subprocess.Popen[str]":
        """Start a command and do not wait for it."""
        return (warm.Popen if self.warm else subprocess.Popen)(
            [sys.executable, "-m", *module, *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, module: tuple[str, ...] = ("distgrow",), timeout_s: float = 240) -> Finished:
        """Run a command to its end."""
        process = self.start(*words, module=module)
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        print(f"--- {' '.join(words)}: exit code {process.returncode}\n{out}{err}")  # shown where a test fails
        return Finished(process.returncode, out, err)

    def train(self, run: str, *overrides: str, resume: bool = False, workers: int = 1) -> Finished:
        """`distgrow train` of the digits, tiny, in the folder `run`; torchrun where there are several workers."""
        words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, f"run.dir={run}", *overrides]
        words += ["--resume"] * resume
        return self(*words, module=torchrun(workers))


def torchrun(workers: int) -> tuple[str, ...]:
    """The modules that `python -m` runs for so many ranks."""
    return ("distgrow",) if workers == 1 else (*agent(workers), "-m", "distgrow")


def agent(workers: int) -> tuple[str, ...]:
    """torchrun for so many ranks, without the rendezvous of `--standalone`, which takes longer than a tiny run."""
    return ("torch.distributed.run", "--master-port", str(free_port()), "--nproc-per-node", str(workers))


def free_port() -> int:
    """A port that nothing listens at, below those that the system gives to others by itself."""
    while True:
        port = random.SystemRandom().randrange(21_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port


def in_ranks(script: str, *words: str, workers: int) -> None:
    """Run a script of tests/dist, which makes its own process group, in so many ranks of one thread each."""
    launcher = ["-m", *agent(workers)] if workers > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tests/dist" / script), *words]
    finished = warm.run(command, {**os.environ, "OMP_NUM_THREADS": "1"}, timeout_s=280)
    assert finished.returncode == 0, f"exit code {finished.returncode}\n{finished.stdout}{finished.stderr}"


def wounded(commands: Commands) -> Commands:
    """The same commands, which now find the task with faults."""
    (commands.folder / "wounded.py").write_text((ROOT / "tests/dist/wounded.py").read_text())
    return commands


def deadly(fault: str, mark: Path, who: int = 1, after: int = 12) -> tuple[str, ...]:
    """The digits, with a fault that happens once, which the file `mark` then says."""
    args = f"{{fault: {fault}, mark: '{mark}', who: {who}, after: {after}}}"
    return (f"task={{kind: target, target: 'wounded:deadly', args: {args}}}", "model=null")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two test processes (make test) end at about the same time."""
    longest = ["ray", "dist", "browser", "integrations", "engine", "gpu", "users", "core"]
    items.sort(key=lambda item: longest.index(item.path.parent.name))


@pytest.fixture
def distgrow(tmp_path: Path) -> Commands:
    """The command line, in a scratch folder."""
    return Commands(tmp_path)


def parameters(run: Path) -> Any:
    """All parameters and buffers of a run's last checkpoint, flat, float64."""
    import torch

    last = max((run / "checkpoints").glob("step-*"))
    state = torch.load(last / "engine.pt", weights_only=True)["model"]
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def ledger(run: Path) -> dict[str, int]:
    """The ledger of a run's last checkpoint."""
    last = max((run / "checkpoints").glob("step-*"))
    return json.loads((last / "progress.json").read_text())["ledger"]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics.jsonl, read as another program would: the last line may be half."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in whole if line["event"] == kind]


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """No test leaves a launcher's environment variables, threads, processes or a process group behind."""
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    watched = ("RANK", "WORLD_", "LOCAL_", "MASTER_", "OMP_", "RAY_", "GLOO_", "NCCL_", "CUDA_")
    changed = {k for k in {*environment, *os.environ} if environment.get(k) != os.environ.get(k)}
    assert not [key for key in changed if key.startswith(watched)], f"environment changed: {changed}"
    left = [thread for thread in set(threading.enumerate()) - threads if thread.is_alive() and not thread.daemon]
    if left:
        gc.collect()  # threads of a pool that nobody shuts down end with the pool
        for thread in left:
            thread.join(5)
        left = [thread for thread in left if thread.is_alive()]
    assert not left, f"threads left running: {left}"
    assert not multiprocessing.active_children(), "processes were left behind"
    if torch := sys.modules.get("torch"):
        assert not torch.distributed.is_initialized(), "a process group was left behind"
