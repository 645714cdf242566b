"""`ray up` and `ray submit` with launch/cluster.yaml: real ssh and rsync to separate hosts."""

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="needs the extra 'ray'")

from conftest import ROOT, TINY, Commands, ledger, parameters
from hosts import RAY_COMMAND, Hosts, unable
from test_hosts import shipped

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
REASON = unable() or (None if SSHD and shutil.which("rsync") and shutil.which("ssh") else "needs sshd, ssh and rsync")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


@contextmanager
def ssh_hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts that ssh answers on, each with a home, processes and temporary files of its own."""
    environment = {"PATH": f"{Path(RAY_COMMAND).parent}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder), **TOKEN}
    made = Hosts(environment=environment, folder=str(folder))
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("client", "server"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        made.make(2)
        for number in (1, 2):
            servers.append(serve(made, number, folder))
        yield made
    finally:
        for server in servers:
            server.kill()
            server.wait()
        made.remove()


def serve(made: Hosts, number: int, folder: Path) -> "subprocess.Popen[bytes]":
    """An ssh server on a host. `ray stop` there, which ends every Ray that it sees, sees only that host's."""
    home = folder / f"home{number}"
    (folder / str(number)).mkdir()
    home.mkdir()
    (home / "venv").symlink_to(sys.prefix)
    people = folder / f"passwd{number}"
    people.write_text(f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:999:65534::/run/sshd:/usr/sbin/nologin\n")
    settings = folder / f"sshd{number}"
    own = " ".join(f"{name}={value}" for name, value in {**TOKEN, "RAY_TMPDIR": f"{folder}/{number}"}.items())
    settings.write_text(
        f"HostKey {folder}/server\nAuthorizedKeysFile {folder}/client.pub\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin yes\nPidFile none\nSetEnv {own} OMP_NUM_THREADS=1\n"
    )
    inside = f"mount --bind {people} /etc/passwd && exec {SSHD} -D -f {settings}"
    apart = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
    return subprocess.Popen([*made.on(number), *apart, "sh", "-c", inside], stderr=subprocess.DEVNULL)


def filled_in(made: Hosts, folder: Path) -> Path:
    """launch/cluster.yaml with these hosts; the environment that its setup would make is there."""
    spec = yaml.safe_load((ROOT / "launch/cluster.yaml").read_text())
    spec["provider"] |= {"head_ip": made.address(1), "worker_ips": [made.address(2)]}
    spec |= {"min_workers": 1, "max_workers": 1}  # two hosts that start Ray at once would take two cores too long
    spec["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "client")}
    spec["setup_commands"] = [command for command in spec["setup_commands"] if "bashrc" in command]
    head, worker = f"--num-cpus=1 --node-ip-address={made.address(1)} --head", "--num-cpus=1 --address"
    spec["head_start_ray_commands"] = [line.replace("--head", head) for line in spec["head_start_ray_commands"]]
    spec["worker_start_ray_commands"] = [
        line.replace("--address", worker) for line in spec["worker_start_ray_commands"]
    ]
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(spec))
    return file


def test_ray_submit_with_the_example_cluster_gives_the_parameters_of_torchrun(distgrow: Commands) -> None:
    checkout, run = shipped(distgrow.folder), distgrow.folder / "submitted"
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path has at most 107 bytes
    try:
        with ssh_hosts(folder) as made:
            cluster = str(filled_in(made, folder))

            def ray(*words: str) -> "subprocess.CompletedProcess[str]":
                command = [*made.on(1), RAY_COMMAND, *words]
                return subprocess.run(
                    command, cwd=checkout, env=made.own(1), capture_output=True, text=True, timeout=200, check=False
                )

            up = ray("up", "-y", "--no-config-cache", cluster)
            assert up.returncode == 0, up.stdout + up.stderr
            deadline = time.monotonic() + 150
            while "/2.0 CPU" not in (status := ray("exec", cluster, "ray status").stdout):
                assert time.monotonic() < deadline, f"the worker does not join: {status}"
                time.sleep(2)
            words = [*TINY, f"run.dir={run}", "launch.workers=2", "launch.placement=STRICT_SPREAD"]
            done = ray("submit", cluster, "launch/ray_train.py", "configs/digits.yaml", *map(shlex.quote, words))
            assert done.returncode == 0, done.stdout + done.stderr
            ray("down", "-y", cluster)
        assert distgrow.train("torchrun", workers=2).code == 0
        assert (parameters(distgrow.folder / "torchrun") == parameters(run)).all()
        assert ledger(distgrow.folder / "torchrun") == ledger(run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
