"""StopRequests: requests to stop or to checkpoint, by signals and by files in the run's folder."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal, NamedTuple, get_args

from distgrow.run.folder import RunFolder

#: Signals that a run can answer with a checkpoint.
StopSignal = Literal["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
#: Seconds between two looks at the run's folder.
LOOK_S = 1.0
_SAVING = b"\ndistgrow: Ctrl-C: a checkpoint is written, then the run ends; a second Ctrl-C ends it at once\n"


class Requests(NamedTuple):
    """Hold what has been asked of a run."""

    stop: bool  #: write a checkpoint and end
    checkpoint: bool  #: write a checkpoint and go on


class StopRequests:
    """Collect requests to stop or to checkpoint. The run's folder is looked at once a second."""

    def __init__(
        self, folder: RunFolder, signals: Sequence[StopSignal] = ("SIGTERM",), *, silent: bool = False
    ) -> None:
        """Take the run's folder and the signals that stop it. If `silent`, Ctrl-C is not answered on stderr."""
        self._folder, self._signals, self._silent = folder, [signal.Signals[name] for name in signals], silent
        self._stop, self._next_look = False, 0.0
        self.interrupted = False  #: Ctrl-C (SIGINT) was one of the requests to this process

    def poll(self) -> Requests:
        """Return what is asked now. A request to stop stays, a request for a checkpoint is returned once."""
        now, checkpoint = time.monotonic(), False
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            checkpoint = self._folder.checkpoint_requested()
            self._stop = self._folder.stop_requested() or self._stop
        return Requests(stop=self._stop, checkpoint=checkpoint)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn signals into requests to stop inside the context.

        A signal that this process ignores stays ignored. In a thread (as in a Ray worker) signals cannot be caught.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = [number for number in self._signals if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._stop = True
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if not self._silent:
                os.write(2, _SAVING)  # print could interrupt a print


def leave_stopping_to_the_trainer() -> None:
    """Keep the signals that stop a run, but SIGTERM, from ending a process that the trainer has started.

    Ctrl-C and SLURM send them to all processes of a run, and the trainer needs this one for its checkpoint.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in get_args(StopSignal):
        if name != "SIGTERM" and signal.getsignal(signal.Signals[name]) is signal.SIG_DFL:
            signal.signal(signal.Signals[name], signal.SIG_IGN)
