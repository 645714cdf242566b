"""The same run on real local Ray clusters: the verb, `ray job submit`, and failures."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="needs the extra 'ray'")

from conftest import ROOT, TINY, Commands, Finished, deadly, events, ledger, parameters, wounded
from hosts import RAY_COMMAND, answers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
RAY = ("launch.kind=ray", "launch.workers=2")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of this one host, started as an operator would; the environment that names it."""
    port, dashboard = free_port(), free_port()
    url = f"http://127.0.0.1:{dashboard}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "OMP_NUM_THREADS": "1"}
    # Ray keeps sockets below its folder and a socket's path has at most 107 bytes: pytest's own folders are too long.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            RAY_COMMAND, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
            "--num-cpus=2", "--node-ip-address=127.0.0.1", "--disable-usage-stats", f"--temp-dir={folder}",
        ]  # fmt: skip
        node = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            log = Path(folder, "session_latest/logs/dashboard.log")
            assert answers(f"{url}/api/version", seconds=120), f"Ray's dashboard is silent: {log.read_text()[-2000:]}"
            yield {**token, "RAY_ADDRESS": f"127.0.0.1:{port}", "DASHBOARD": url}
        finally:  # not `ray stop`, which ends every Ray of this machine
            for process in [*node.children(recursive=True), node]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            node.wait()


def test_a_local_ray_gives_the_parameters_and_ledger_of_torchrun(distgrow: Commands) -> None:
    assert distgrow.train("torchrun", workers=2).code == 0
    finished = distgrow.train("ray", *RAY)
    assert finished.code == 0, finished.err
    assert (parameters(distgrow.folder / "torchrun") == parameters(distgrow.folder / "ray")).all()
    assert ledger(distgrow.folder / "torchrun") == ledger(distgrow.folder / "ray")
    assert {step["world"] for step in events(distgrow.folder / "ray", "step")} == {2}


def accepted(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Submit a job, again while Ray's dashboard is there and its agent on the node not yet."""
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > end:
            return done
        time.sleep(2)


@pytest.mark.slow
def test_a_job_submitted_with_its_working_directory_gives_the_parameters_of_torchrun(
    distgrow: Commands, cluster: dict[str, str]
) -> None:
    run = distgrow.folder / "submitted"
    shipped = distgrow.folder / "checkout"
    shipped.mkdir()
    for part in ("distgrow", "launch", "configs"):
        subprocess.run(["cp", "-r", str(ROOT / part), str(shipped)], check=True)
    command = [RAY_COMMAND, "job", "submit", "--address", cluster["DASHBOARD"], "--working-dir", str(shipped), "--"]
    command += [
        sys.executable,
        "launch/ray_train.py",
        "configs/digits.yaml",
        *TINY,
        f"run.dir={run}",
        "launch.workers=2",
    ]
    submitted = accepted(command, {**os.environ, **cluster, "RAY_ADDRESS": cluster["DASHBOARD"]})
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert distgrow.train("torchrun", workers=2).code == 0
    assert (parameters(distgrow.folder / "torchrun") == parameters(run)).all()


@pytest.mark.slow
def test_a_worker_that_raises_ends_the_run_with_its_error_first(distgrow: Commands, cluster: dict[str, str]) -> None:
    (distgrow.folder / "rotten.py").write_text(
        """
import torch
from torch import nn
from torch.distributed import get_rank

class Data:
    def __len__(self):
        return 100
    def __getitem__(self, index):
        if get_rank() == 1 and index == 50:
            raise ArithmeticError("sample 50 is rotten")
        return torch.ones(3)

def make():
    return nn.Linear(3, 1), lambda model, batch: model(batch).square().mean(), Data()
"""
    )
    distgrow.environment.update(cluster)
    finished = distgrow.train("run", "task={kind: target, target: 'rotten:make'}", "model=null", *RAY)
    assert finished.code == 1
    told = finished.err[finished.err.index("RuntimeError: worker 1 failed first") :]
    assert "ArithmeticError: sample 50 is rotten" in told
    assert not events(distgrow.folder / "run", "end")


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_worker_is_replaced_and_nothing_is_lost(distgrow: Commands, cluster: dict[str, str]) -> None:
    distgrow.environment.update(cluster)
    task = (*deadly("in forward", distgrow.folder / "died", after=20), "run.checkpoint={every_steps: 7, keep: 3}")
    killed = wounded(distgrow).train("killed", *task, *RAY, "launch.max_failures=1")
    assert killed.code == 0, killed.err
    assert (distgrow.folder / "died").exists()
    assert distgrow.train("whole", *task, workers=2).code == 0
    assert (parameters(distgrow.folder / "killed") == parameters(distgrow.folder / "whole")).all()
    assert {**ledger(distgrow.folder / "killed"), "replayed": 0} == ledger(distgrow.folder / "whole")
    assert len(events(distgrow.folder / "killed", "resume")) == 1


@pytest.mark.slow
def test_checkpoints_in_other_storage_outlive_the_runs_folder(distgrow: Commands, cluster: dict[str, str]) -> None:
    distgrow.environment.update(cluster)
    kept = (*RAY, f"launch.storage_path=file://{distgrow.folder}/storage", "run.checkpoint.every_steps=9")
    assert distgrow.train("run", *kept).code == 0
    assert not list((distgrow.folder / "run/checkpoints").iterdir())
    assert distgrow.train("torchrun", workers=2).code == 0
    assert (parameters(distgrow.folder / "storage/run") == parameters(distgrow.folder / "torchrun")).all()
    shutil.rmtree(distgrow.folder / "run")
    assert distgrow.train("run", *kept, resume=True).code == 0
    assert len(events(distgrow.folder / "run", "resume")) == 1


def test_an_address_where_nothing_listens_is_told_at_once(distgrow: Commands) -> None:
    finished = distgrow.train("run", *RAY, f"launch.address=127.0.0.1:{free_port()}")
    assert finished.code == 2
    assert "no Ray cluster answers there; start one (ray start --head)" in finished.err
    assert not (distgrow.folder / "run").exists()


@pytest.mark.slow
def test_bad_input_that_only_workers_meet_is_a_message_and_code_2(distgrow: Commands, cluster: dict[str, str]) -> None:
    distgrow.environment.update(cluster)
    assert distgrow.train("run", *RAY).code == 0
    finished = distgrow.train("run", *RAY, "lr.base=0.3", resume=True)
    assert finished.code == 2
    assert finished.err.rstrip().splitlines()[-1].strip() == "lr.base: 0.05 in the folder, 0.3 now"


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_driver_is_a_checkpoint_and_exit_code_0(
    distgrow: Commands, cluster: dict[str, str], sent: signal.Signals
) -> None:
    distgrow.environment.update(cluster)
    config = str(ROOT / "configs/digits.yaml")
    words = ["run.dir=run", "budget={epochs: 4000}", "run.stop_signals=[SIGUSR1]"]
    process = distgrow.start("train", config, *RAY, *words)
    metrics = distgrow.folder / "run/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and '"step": 20,' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert events(distgrow.folder / "run", "end")[0]["reason"] == "stopped on request"
    assert ledger(distgrow.folder / "run")["applied"] == events(distgrow.folder / "run", "end")[0]["samples"]


GROWING = ("engine.precision=float64", "budget={samples: 900}", "launch.kind=ray")  # batches of 8, 16 and 32


def growing(distgrow: Commands, *overrides: str) -> Finished:
    """A run in several worker groups, each of which takes Ray half a minute to start."""
    return distgrow("train", str(ROOT / "configs/digits.yaml"), *TINY, *GROWING, *overrides, timeout_s=240)


def resizes(run: Path) -> list[tuple[int, int, int]]:
    """(old, new, wanted) of every resize."""
    return [(event["old"], event["new"], event["wanted"]) for event in events(run, "resize")]


def same_but_for_rounding(one: Path, other: Path) -> bool:
    """Whether two runs end with the same ledger, and the same parameters to float64's tolerance."""
    apart = (parameters(one) - parameters(other)).norm()
    return ledger(one) == ledger(other) and bool(apart <= 1e-10 * parameters(one).norm())


@pytest.mark.slow
def test_workers_grow_with_the_batch_in_fresh_worker_groups(distgrow: Commands) -> None:
    assert distgrow.train("fixed", *GROWING[:2]).code == 0
    grown = growing(distgrow, "run.dir=grown", "launch.workers=[1, 2]", "engine.max_micro=8")
    assert grown.code == 0, grown.err
    run = distgrow.folder / "grown"
    assert same_but_for_rounding(distgrow.folder / "fixed", run)
    assert resizes(run) == [(1, 2, 2)]
    assert {(step["stage"], step["world"]) for step in events(run, "step")} == {(0, 1), (1, 2), (2, 2)}
    assert [(event["reason"], event["samples"]) for event in events(run, "end")] == [("done", 900)]


@pytest.mark.slow
def test_where_the_cluster_has_no_room_in_time_the_run_goes_on_with_fewer_and_says_so(
    distgrow: Commands, cluster: dict[str, str]
) -> None:
    assert distgrow.train("fixed", *GROWING[:2]).code == 0
    distgrow.environment.update(cluster)  # it has two CPUs
    finished = growing(distgrow, "run.dir=short", "launch.workers={0: 1, 1: 3}", "launch.resize_wait_s=2")
    assert finished.code == 0, finished.err
    run = distgrow.folder / "short"
    assert same_but_for_rounding(distgrow.folder / "fixed", run)
    assert resizes(run) == [(1, 2, 3)]
    assert "no room for the 3 workers wanted within 2 s (launch.resize_wait_s); going on with 2" in finished.err
    assert events(run, "resize")[0]["seconds"] > 2
