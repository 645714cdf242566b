"""Drivers and clients of a Ray cluster come and go; the run there goes on, is seen, and can be ended."""

import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="needs the extra 'ray'")

from conftest import Commands, events, ledger
from disturbed import HERE, assert_same, ranks_at_gate, start, undisturbed_run, until, words
from hosts import RAY_COMMAND, Hosts, hosts, unable

REASON = unable()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """One host, which is the head and has the workers."""
    with hosts((2,)) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks under torchrun that nothing happens to."""
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"))


def trainers(cluster: Hosts) -> int:
    """The processes on the head that keep a run."""
    found = 0
    for pid in cluster.pids(1):
        with suppress(psutil.NoSuchProcess):
            found += "ray::_TrainerActor" in " ".join(psutil.Process(pid).cmdline())
    return found


def test_a_run_outlives_its_driver_and_is_still_good_for_a_retry(
    distgrow: Commands, cluster: Hosts, undisturbed: Path
) -> None:
    folder = distgrow.folder
    driver = start(cluster, folder, "launch.max_failures=1")
    workers = ranks_at_gate(cluster, folder)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait(10) == -signal.SIGKILL
    assert trainers(cluster) == 1
    second = cluster.run(1, "env", f"PYTHONPATH={HERE}", *words(folder, "--resume"))
    assert second.returncode == 2, second.stdout + second.stderr
    assert f"run.dir={folder / 'run'} is being trained on the Ray cluster" in second.stderr
    assert f"end it after a checkpoint with 'touch {folder / 'run/.stop'}'" in second.stderr
    psutil.Process(workers[1]).kill()
    (folder / "gate").touch()
    until(lambda: bool(events(folder / "run", "end")), 300, "the end of the run")
    assert_same(folder / "run", undisturbed)
    until(lambda: trainers(cluster) == 0, 60, "the actor that kept the run ends")


def test_a_submitted_job_outlives_its_client_is_seen_on_the_dashboard_and_stops_with_a_checkpoint(
    distgrow: Commands, cluster: Hosts
) -> None:
    folder = distgrow.folder
    submit = (RAY_COMMAND, "job", "submit", "--address", cluster.dashboard, "--submission-id", "seen", "--")
    command = ("env", f"PYTHONPATH={HERE}", *words(folder))
    client = cluster.start(1, *submit, *command, log=folder / "log")
    ranks_at_gate(cluster, folder)
    client.kill()
    client.wait()
    runs = json.loads(cluster.fetch(f"{cluster.dashboard}/api/train/v2/runs/v1"))["train_runs"]
    assert runs[0]["name"].startswith("run-"), runs  # the newest comes first
    assert runs[0]["status"] == "RUNNING", runs
    port = cluster.nodes()[cluster.address(1)]["metricsExportPort"]
    figures = f"http://{cluster.address(1)}:{port}/metrics"

    def step() -> float:
        lines = [line for line in cluster.fetch(figures).splitlines() if line.startswith("ray_distgrow_step{")]
        return max((float(line.rpartition(" ")[2]) for line in lines if f'run="{folder / "run"}"' in line), default=0)

    until(lambda: 10 <= step() <= 19, 40, "the run's figures among Ray's metrics")  # Ray sends them now and then
    stopped = cluster.run(1, RAY_COMMAND, "job", "stop", "--address", cluster.dashboard, "seen")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    (folder / "gate").touch()
    until(lambda: bool(events(folder / "run", "end")), 300, "the end of the run")
    assert events(folder / "run", "end")[0]["reason"] == "stopped on request"
    assert 160 <= ledger(folder / "run")["applied"] < 1500
    until(lambda: trainers(cluster) == 0, 60, "the actor that kept the run ends")
