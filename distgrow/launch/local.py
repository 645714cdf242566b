"""Local: the launcher that trains on this host, in this process or in groups of processes through torchrun."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Literal, NoReturn

from distgrow.distributed.environment import defaults
from distgrow.launch.base import Job, LauncherSpec
from distgrow.launch.elastic import groups, launching
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder
from distgrow.run.resume_mode import ResumeMode
from distgrow.run.stop import StopSignal


class Local(LauncherSpec):
    """On this host: in this process, or in several through torchrun."""

    kind: Literal["local"] = "local"

    def train(self, job: Job, *, resume: ResumeMode, rebudget: bool, command: Sequence[str]) -> int:
        """See LauncherSpec. If the number of ranks changes with the stage, one group follows the other.

        The exit code is 0 after a signal of run.stop_signals but Ctrl-C if everything was saved.
        """
        folder = RunFolder(job.run.dir)
        folder.stop_requested()  # drop a request that was left over: it is not meant for this run
        folder.check(resume=resume.resumes(folder.begun))
        if self.workers == 1:
            job.fit(resume=resume, rebudget=rebudget)
            return 0
        return _train_in_groups(job, folder, command)


def _train_in_groups(job: Job, folder: RunFolder, command: Sequence[str]) -> int:
    """Train in one group of ranks after the other, and return the exit code."""
    endings, elastic = folder.endings(), job.launch.elastic
    with launching(folder) if elastic else nullcontext():
        sized = ((size, [*command, *[f"--asked={size}"] * elastic]) for size in groups(job, folder))
        code = run_groups(sized, restarts=job.launch.max_failures, signals=job.run.stop_signals)
        between_groups = elastic and resize_request.pending(folder)
    if between_groups:
        print("distgrow: stopped between two groups; everything is saved, --resume goes on", file=sys.stderr)
    saved = between_groups or folder.endings() > endings
    return 0 if code > 128 and code != 128 + signal.SIGINT and saved else code


def run_groups(
    sized: Iterable[tuple[int, Sequence[str]]], *, restarts: int = 0, signals: Sequence[StopSignal] = ()
) -> int:
    """Run `python -m distgrow arguments` for each (ranks, arguments), one group after the other.

    If a rank fails, its group is started again, at most `restarts` times.

    Args:
        sized: Ranks and arguments of each group.
        restarts: How often a group is started again.
        signals: Signals that are passed on to the ranks, beside those that torchrun passes on by itself (SIGTERM,
            SIGINT, SIGHUP and SIGQUIT). The ranks write a checkpoint and end.

    Returns:
        The exit code: 0, that of the failed group, or 128 plus the number of the signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        with _passed_on(signals):
            for workers, arguments in sized:
                _run_group(workers, arguments, restarts)
    except ChildFailedError as error:  # the others are ended; which came first, torch tells by whole seconds alone
        return 2 if any(failure.exitcode == 2 for failure in error.failures.values()) else 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


@contextmanager
def _passed_on(signals: Sequence[StopSignal]) -> Iterator[None]:
    """Make torchrun's agent end its ranks by the signal that this process receives.

    The agent's own handlers, for the signals that it knows, take the place of these once a group is started.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_IGN)  # the agent waits for the ranks now
        raise SignalException(f"received signal {number}", signal.Signals(number))

    before = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, signals)}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in caught:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


def _run_group(workers: int, arguments: Sequence[str], restarts: int) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id="distgrow",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
    )
    with defaults(
        OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // workers)),
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="110",  # a checkpoint may take longer than torch's 30 s
    ):
        elastic_launch(config, sys.executable)("-m", "distgrow", *arguments)


def leave() -> NoReturn:
    """End this process with exit code 0, after threads and exit handlers, without finalising the interpreter.

    Gloo's threads outlive their process group and release tensors. A finalised interpreter aborts on that.
    """
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
