"""Start `python -m distgrow …`, torchrun and scripts as forks of a process that has loaded torch and distgrow.

A new process takes some four seconds to import what a tiny run needs, each rank of torchrun again. A fork has it. The
server imports and never computes, so that it has no threads to lose. It runs as `python tests/warm.py FD`.
"""

import atexit
import ctypes
import gc
import importlib
import inspect
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
PRELOADED = (
    "distgrow.cli",
    "distgrow.training.fit",
    "distgrow.planning.table",
    "distgrow.launch.elastic",
    "distgrow.tracking",
    "distgrow.report.write",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "sklearn.datasets",
)
EXECUTE = cast("Any", subprocess.Popen)._execute_child


class Server:
    """Hold one end of the socket to a process that forks."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.owner = sock, os.getpid()

    def fork(self, request: dict[str, Any], files: list[int]) -> int:
        """Return the id of a new process with these standard files: a child of this process, as of fork and exec."""
        body = os.memfd_create("request")
        os.write(body, json.dumps(request).encode())
        adopt(True)
        try:
            socket.send_fds(self.sock, [b"f"], [body, *files])
            return int(self.sock.recv(32))
        finally:
            adopt(False)
            os.close(body)


def adopt(yes: bool) -> None:
    """Make this process the parent of its descendants' orphans, or no longer."""
    ctypes.CDLL(None).prctl(SUBREAPER, int(yes), 0, 0, 0)


def started() -> Server:
    """Return the server of this process, which starts at the first call."""
    if not _servers or _servers[-1].owner != os.getpid():
        ours, its = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__)), str(its.fileno())]
        process = subprocess.Popen(command, env=environment, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
        its.close()
        _servers.append(Server(ours))
        atexit.register(lambda: (ours.close(), process.wait()))
    return _servers[-1]


_servers: list[Server] = []


def wanted(arguments: list[str], environment: dict[str, str]) -> bool:
    """Return whether a command is one that a fork can run as a new process would; none where TESTS_COLD is set."""
    words = [word for word in arguments[1:] if word != "-u"]
    if (
        "TESTS_COLD" in os.environ
        or arguments[0] != sys.executable
        or environment.get("OMP_NUM_THREADS") != "1"
        or not words
    ):
        return False
    known = words[:1] == ["-m"] and words[1] in ("distgrow", "torch.distributed.run")
    return (known or words[0].endswith(".py")) and not re.search(r"\bray\b", " ".join(words))


class Popen(subprocess.Popen[str]):
    """Run a command that a fork can run as a fork, any other as `subprocess.Popen` does."""

    def _execute_child(self, *given: Any) -> None:
        execute(self, *given)


def run(
    command: list[str], environment: dict[str, str], folder: Path | None = None, timeout_s: float = 240
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, as `subprocess.run` that captures its output."""
    pipe = subprocess.PIPE
    with Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def execute(process: Any, *given: Any) -> None:
    """Do what `Popen._execute_child` does, by a fork of the server."""
    named = inspect.signature(EXECUTE).bind(process, *given).arguments
    environment = dict(named["env"] if named["env"] is not None else os.environ)
    arguments = [os.fspath(word) for word in named["args"]] if not isinstance(named["args"], str) else [named["args"]]
    if named["shell"] or named["preexec_fn"] or named["pass_fds"] or not wanted(arguments, environment):
        return EXECUTE(process, *given)
    request = {
        "words": [word for word in arguments[1:] if word != "-u"],
        "unbuffered": "-u" in arguments[:2],
        "environment": environment,
        "folder": os.fspath(named["cwd"] or Path.cwd()),
        "session": bool(named["start_new_session"]),
    }
    files = [
        own if file == -1 else file for own, file in enumerate((named["p2cread"], named["c2pwrite"], named["errwrite"]))
    ]
    process.pid = started().fork(request, files)
    process._child_created = True
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(named[pipe] for pipe in pipes))
    return None


def serve(sock: socket.socket) -> dict[str, Any]:
    """Fork for every request, until the other end closes; return the request in the new process alone."""
    while True:
        message, files, _, _ = socket.recv_fds(sock, 1, 4)
        if not message:
            os._exit(0)
        body, *standard = files
        read, write = os.pipe()
        if (middle := os.fork()) == 0:
            middle = os.getpid()
            if child := os.fork():
                os.write(write, b"%d" % child)
                os._exit(0)
            while os.getppid() == middle:  # until the process that asked has become the parent
                time.sleep(0.0002)
            for number, file in enumerate(standard):
                os.dup2(file, number)
            request = json.loads(os.pread(body, os.fstat(body).st_size, 0))
            os.close(body)
            for file in (*standard, read, write, sock.detach()):
                os.close(file)
            return request
        os.waitpid(middle, 0)
        sock.send(os.read(read, 32))
        for file in (*files, read, write):
            os.close(file)


def become(request: dict[str, Any]) -> None:
    """Make a fork what a new process of this command would be, and run it."""
    if request["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["unbuffered"]:
        for stream in (sys.stdout, sys.stderr):
            cast("Any", stream).reconfigure(write_through=True)
    if "RANK" not in os.environ:
        keep_a_server()
    words = request["words"]
    name = words[1] if words[0] == "-m" else words[0]
    sys.argv = words[1:] if words[0] == "-m" else words
    first = str(Path.cwd()) if words[0] == "-m" else str(Path(name).resolve().parent)
    added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *added, *(path for path in sys.path[1:] if path != str(ROOT))]
    importlib.invalidate_caches()
    sys.modules["numpy"].random.seed()
    if words[0] == "-m":
        run_and_leave(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))
    else:
        run_and_leave(lambda: runpy.run_path(name, run_name="__main__"))


def run_and_leave(main: Callable[[], Any]) -> None:
    """Run a program and end this process as Python would, but for the finalisation, which would copy all that it has.

    An error or Ctrl-C that the program lets pass ends it as it does anywhere.
    """
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if end.code is not None else 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    cast("Any", threading)._shutdown()
    cast("Any", atexit)._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def keep_a_server() -> None:
    """Fork a server for the ranks that this process may start, while it has no threads of its own."""
    ours, its = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for file in range(3):
            os.dup2(nothing, file)
        become(serve(its))
        sys.exit(0)
    its.close()
    _servers.append(Server(ours))
    cast("Any", subprocess.Popen)._execute_child = execute


def main() -> None:
    """Load what runs need, then serve until the tests end."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in PRELOADED:
        with suppress(ImportError):  # an extra that is not installed
            importlib.import_module(module)
    gc.freeze()
    become(serve(sock))


if __name__ == "__main__":
    main()
