"""Signals and files that ask a run to stop."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from distgrow.core.errors import ConfigError
from distgrow.run.folder import RunFolder
from distgrow.run.stop import StopRequests
from distgrow.training.spec import RunSpec


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"])
def test_each_signal_that_is_named_stops_the_run_and_is_free_afterwards(name: str, folder: RunFolder) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    requests = StopRequests(folder, RunSpec(stop_signals=[name]).stop_signals)  # pyright: ignore[reportArgumentType]
    with requests.watched():
        assert not requests.poll().stop
        os.kill(os.getpid(), number)
        assert requests.poll().stop
        assert requests.poll().stop  # a request to stop stays
    assert signal.getsignal(number) is before
    assert requests.interrupted == (name == "SIGINT")


def test_a_second_ctrl_c_ends_the_run_at_once(folder: RunFolder) -> None:
    requests = StopRequests(folder, ["SIGINT"])
    with pytest.raises(KeyboardInterrupt), requests.watched():
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.poll().stop
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_is_no_more_than_the_first(folder: RunFolder) -> None:
    requests = StopRequests(folder, ["SIGTERM"])
    with requests.watched():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.poll().stop


def test_a_signal_that_is_ignored_stays_ignored(folder: RunFolder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    requests = StopRequests(folder, ["SIGINT"])
    with requests.watched():
        os.kill(os.getpid(), signal.SIGINT)
        assert not requests.poll().stop


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "sigterm", "TERM", "USR1", "SIGNONE"])
def test_other_names_of_signals_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="SIGUSR1"):
        RunSpec(stop_signals=[name])  # pyright: ignore[reportArgumentType]
