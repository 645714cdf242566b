"""Local launch: groups of processes on this host, through torchrun."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NoReturn

from distgrow.config.run import Run
from distgrow.distributed.environment import _defaults
from distgrow.launch.elastic import groups, launching
from distgrow.run import resize_request
from distgrow.run.folder import RunFolder


def train(run: Run, folder: RunFolder, arguments: Sequence[str]) -> int:
    """Train on several ranks of this host: in one group, or in one after the other if its size changes with the stage.

    Args:
        run: The run.
        folder: The folder of the run.
        arguments: Arguments of `python -m distgrow` for each rank.

    Returns:
        The exit code. It is 0 after SIGTERM if everything was saved.
    """
    endings, elastic = folder.endings(), run.launch.elastic
    with launching(folder) if elastic else nullcontext():
        sized = ((size, [*arguments, *[f"--asked={size}"] * elastic]) for size in groups(run, folder))
        code = run_groups(sized, restarts=run.launch.max_failures)
        between_groups = elastic and resize_request.pending(folder)
    if between_groups:
        print("distgrow: stopped between two groups; everything is saved, --resume goes on", file=sys.stderr)
    saved = between_groups or folder.endings() > endings
    return 0 if code == 128 + signal.SIGTERM and saved else code


def run_groups(sized: Iterable[tuple[int, Sequence[str]]], *, restarts: int = 0) -> int:
    """Run `python -m distgrow arguments` for each (ranks, arguments), one group after the other.

    If a rank fails, its group is started again, at most `restarts` times. A signal is passed on to the ranks, which
    write a checkpoint and end on SIGTERM.

    Returns:
        The exit code: 0, that of the failed group, or 128 plus the number of the signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        for workers, arguments in sized:
            _run_group(workers, arguments, restarts)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return 2 if first.exitcode == 2 else 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


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
    with _defaults(
        OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // workers)),
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="110",  # a checkpoint may take longer than torch's 30 s
        # a store that outlives a group would give the next one the addresses of ranks that have died
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
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
