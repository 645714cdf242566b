"""Hang detection: which rank did not join a collective, and which line it executes instead. Knows no training.

A rank that waits cannot see which rank is missing, since a ring only shows that a neighbour is silent. Therefore each
rank runs a thread that looks every few seconds for a request for status. It answers with the line of Python that its
rank executes. A rank without an answer has ended. A rank that answers from outside a collective is the one that the
others wait for.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distgrow.core.errors import TrainingFailed

#: Seconds between two looks for a request, and seconds within which every live rank answers.
LOOK_S, ANSWER_S = 2.0, 7.0
#: The files that a thread executes while it waits for other ranks: ends of their paths, and parts of their paths.
_WAITING = ("torch/autograd/graph.py", "distgrow/distributed/world.py", "distgrow/distributed/hang_watch.py")
_WAITING_BELOW = ("torch/distributed/", "deepspeed/comm/")
_CALL, _HERE = "distgrow/roll", "waits"


class LostPeer(TrainingFailed):
    """Raised if a rank did not join a collective: it hangs or has ended."""


@contextmanager
def watching_for_hangs(rank: int, size: int) -> Iterator[None]:
    """Watch the collectives inside the context.

    Raises:
        LostPeer: A collective failed or timed out. The message names the missing rank.
    """
    store = dist.distributed_c10d._get_default_store()
    over = threading.Event()
    worker = threading.get_ident()  # not always the main thread: Ray Train has its own
    watch = threading.Thread(target=_answer, args=(store, rank, worker, over), daemon=True, name="roll call")
    watch.start()
    try:
        yield
    except RuntimeError as error:
        if not failed_collective(error):
            raise
        found = _call(store, rank, size)
        raise LostPeer(
            f"{found}. Rank {rank} of {size} waited for all others, launch.timeout_s at most ({_first_line(error)}). "
            "The last checkpoint is good: go on with --resume, or let launch.max_failures do so"
        ) from error
    finally:
        over.set()


def failed_collective(error: BaseException) -> bool:
    """Return True if an error means that ranks could not reach each other."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _answer(store: Any, rank: int, worker: int, over: threading.Event) -> None:
    """Wait until another rank requests this rank's status, and answer."""
    try:
        while not over.wait(LOOK_S):
            if store.check([_CALL]):
                store.set(f"{_CALL}/{rank}", whereabouts(worker))
                return
    except RuntimeError:  # the store has ended with its rank
        return


def whereabouts(thread: int) -> str:
    """Return 'waits' if a thread waits for other ranks, else the line of code that it executes."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "nowhere"
    file = frame.f_code.co_filename.replace("\\", "/")
    if file.endswith(_WAITING) or any(part in file for part in _WAITING_BELOW):
        return _HERE
    return f"{Path(file).name}:{frame.f_lineno}, in {frame.f_code.co_name}"


def _call(store: Any, rank: int, size: int) -> str:
    """Ask every rank for its status and return one sentence about those that are missing."""
    answers: dict[int, str] = {rank: _HERE}
    try:
        store.set(f"{_CALL}/{rank}", _HERE)
        store.set(_CALL, "called")
        deadline = time.monotonic() + ANSWER_S
        while len(answers) < size and time.monotonic() < deadline:
            for other in range(size):
                if other not in answers and store.check([f"{_CALL}/{other}"]):
                    answers[other] = store.get(f"{_CALL}/{other}").decode()
            time.sleep(0.1)
    except RuntimeError:
        return "rank 0, which keeps the group together, has ended or cannot be reached"
    return verdict(answers, size)


def verdict(answers: dict[int, str], size: int) -> str:
    """Return one sentence about the missing ranks, given the status of those that answered."""
    silent = [str(rank) for rank in range(size) if rank not in answers]
    elsewhere = [f"rank {rank} stayed away: it is at {place}" for rank, place in answers.items() if place != _HERE]
    if silent:
        name, verb = ("rank", "has") if len(silent) == 1 else ("ranks", "have")
        return f"{name} {', '.join(silent)} {verb} ended, or cannot be reached"
    return "; ".join(elsewhere) or "all ranks live and wait: the network between them has failed"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
