"""Hosts for tests: network namespaces on one bridge, each with an address of its own and a Ray node in it."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARNING = re.compile(r",\d+ [WEF] |WARN|Err|ERR")
RAY_COMMAND = str(Path(sys.executable).parent / "ray")
ASK = """
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=5)
except urllib.error.HTTPError:
    pass
"""


FETCH = """
import os, sys, urllib.request
token = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
print(urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=token), timeout=20).read().decode())
"""


def answers(url: str, seconds: float, inside: tuple[str, ...] = ()) -> bool:
    """Whether an HTTP server answers within so many seconds, be it by a refusal for lack of a token."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        asked = subprocess.run([*inside, sys.executable, "-c", ASK, url], capture_output=True, check=False)
        if asked.returncode == 0:
            return True
        time.sleep(0.2)
    return False


def unable() -> str | None:
    """Why this machine cannot make hosts, or None."""
    if shutil.which("ip") is None:
        return "needs iproute2"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"dgx{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None if made.returncode == 0 else f"cannot make network namespaces: {made.stderr.strip()}"


@dataclass
class Hosts:
    """Some hosts, numbered from 1, joined by a bridge in a namespace of its own."""

    tag: str = field(default_factory=lambda: secrets.token_hex(2))
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/tmp"

    def name(self, number: int) -> str:
        return f"dg{self.tag}-{number}"

    def address(self, number: int) -> str:
        return f"10.{64 + int(self.tag[:2], 16) % 64}.{int(self.tag[2:], 16)}.{number}"

    def on(self, number: int) -> tuple[str, ...]:
        """What to put before a command to run it on a host."""
        return ("ip", "netns", "exec", self.name(number))

    def own(self, number: int) -> dict[str, str]:
        """The environment on a host: Ray's files there are its own."""
        return {**self.environment, "RAY_TMPDIR": f"{self.folder}/{number}"}

    def run(self, number: int, *command: str, timeout_s: float = 240) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host to its end."""
        return subprocess.run(
            [*self.on(number), *command], env=self.own(number), capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip

    def start(self, number: int, *command: str, log: Path, **environment: str) -> "subprocess.Popen[bytes]":
        """Start a command on a host, its output in a file, and do not wait for it."""
        with log.open("wb") as output:
            return subprocess.Popen(
                [*self.on(number), *command],
                env={**self.own(number), **environment}, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def of(self, pid: int) -> int:
        """The host that a process runs on."""
        named = subprocess.run(["ip", "netns", "identify", str(pid)], capture_output=True, text=True, check=True)
        return int(named.stdout.strip().rpartition("-")[2])

    def make(self, count: int) -> None:
        """The namespaces, the bridge and the cables."""
        switch = self.name(0)
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge0", "up")
        for number in range(1, count + 1):
            name, port = self.name(number), f"port{number}"
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "cable0", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")

    def start_ray(self, number: int, *, cpus: int) -> None:
        """An ordinary `ray start` on a host; the first is the head."""
        Path(self.folder, str(number)).mkdir(exist_ok=True)
        where = f"--node-ip-address={self.address(number)}"
        head = ("--head", "--port=6379", f"--dashboard-host={self.address(1)}")
        role = head if number == 1 else (f"--address={self.address(1)}:6379",)
        started = self.run(number, RAY_COMMAND, "start", *role, where, f"--num-cpus={cpus}", "--disable-usage-stats")
        assert started.returncode == 0, started.stdout + started.stderr
        if number == 1:
            assert answers(f"{self.dashboard}/api/version", 120, self.on(1)), "Ray's dashboard is silent"

    @property
    def dashboard(self) -> str:
        return f"http://{self.address(1)}:8265"

    def fetch(self, url: str) -> str:
        """What a server on the head answers to somebody with the token."""
        got = self.run(1, sys.executable, "-c", FETCH, url, timeout_s=30)
        assert got.returncode == 0, got.stderr
        return got.stdout

    def nodes(self) -> dict[str, dict[str, Any]]:
        """What the dashboard knows of the hosts that live, by their address."""
        summary = json.loads(self.fetch(f"{self.dashboard}/nodes?view=summary"))["data"]["summary"]
        return {node["ip"]: node["raylet"] for node in summary if node["raylet"]["state"] == "ALIVE"}

    def complaints(self) -> str:
        """The last warnings and errors that Ray's servers, jobs and workers have logged."""
        told = ""
        for kind in ("gcs_server.*", "raylet.*", "job-driver-*.log", "worker-*.err"):
            for log in sorted(Path(self.folder).glob(f"*/ray/session_2*/logs/{kind}")):
                lines = [line for line in log.read_text(errors="replace").splitlines() if WARNING.search(line)]
                told += "".join(f"{log.name}: {line}\n" for line in lines[-10:])
        return told

    def kill(self, number: int) -> None:
        """All of a host's processes, at once."""
        for pid in self.pids(number):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue

    def pids(self, number: int) -> list[int]:
        """All of a host's processes."""
        pids = subprocess.run(["ip", "netns", "pids", self.name(number)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in pids.stdout.split()]

    def unplug(self, number: int) -> None:
        """Take a host's cable away: its packets vanish, its processes live on."""
        ip("-n", self.name(0), "link", "set", f"port{number}", "down")

    def remove(self) -> None:
        """Everything that `make` made and that runs there."""
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
        for name in [line.split()[0] for line in listed.splitlines() if line.startswith(f"dg{self.tag}-")]:
            self.kill(int(name.rpartition("-")[2]))
            ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def hosts(cpus: tuple[int, ...], *, spare: int = 0, **settings: str) -> Iterator[Hosts]:
    """One host for each number of CPUs, with Ray running and token authentication on, and some without Ray."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Ray keeps sockets below its folder and a socket's path has at most 107 bytes: pytest's own folders are too long.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Hosts(environment={**os.environ, **token, "OMP_NUM_THREADS": "1", **settings}, folder=folder)
        try:
            made.make(len(cpus) + spare)
            for number, count in enumerate(cpus, start=1):
                made.start_ray(number, cpus=count)
            yield made
        finally:
            made.remove()
