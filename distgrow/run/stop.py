"""Requests to stop or to checkpoint: signals, and files in the run's folder."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from distgrow.run.folder import RunFolder


class StopRequests:
    """Whether SIGTERM has come, or somebody asked through the run's folder (looked at once a second)."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._signalled, self._next_look = folder, threading.Event(), 0.0
        self._checkpoint = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + 1.0
            self._checkpoint = self._folder.checkpoint_requested()
            if self._folder.stop_requested():
                self._signalled.set()
        return self._signalled.is_set()

    def checkpoint(self) -> bool:
        """Whether the last look has found that somebody asked for a checkpoint; told once."""
        asked, self._checkpoint = self._checkpoint, False
        return asked

    @contextmanager
    def watched(self) -> Iterator[None]:
        """SIGTERM's usual effect is held back meanwhile; in a thread (as in a Ray worker) it cannot be caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self._signalled.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
