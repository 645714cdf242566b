"""The same run on separate hosts: network namespaces with addresses of their own, ordinary `ray start` in each."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra 'ray'")

from conftest import ROOT, TINY, Commands, events, ledger, parameters
from hosts import RAY_COMMAND, Hosts, hosts, unable

REASON = unable()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """A head without CPUs, and two hosts for the workers."""
    with hosts((0, 2, 2)) as made:
        yield made


def shipped(folder: Path) -> Path:
    """What a user submits: the checkout, without its environment."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for part in ("distgrow", "launch", "configs"):
        subprocess.run(["cp", "-r", str(ROOT / part), str(checkout)], check=True)
    return checkout


@pytest.mark.slow
def test_a_job_on_two_hosts_gives_the_parameters_and_ledger_of_torchrun_and_of_one_process(
    distgrow: Commands, cluster: Hosts
) -> None:
    run = distgrow.folder / "submitted"
    double = "engine.precision=float64"
    done = cluster.run(
        1, RAY_COMMAND, "job", "submit", "--address", cluster.dashboard, "--working-dir", str(shipped(distgrow.folder)),
        "--", sys.executable, "launch/ray_train.py", "configs/digits.yaml", *TINY, double, f"run.dir={run}",
        "launch.workers=2", "launch.placement=STRICT_SPREAD",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for address in (cluster.address(2), cluster.address(3)):
        assert f"(ip={address}, pid=" in done.stdout  # Ray's own list of the worker group
    assert distgrow.train("torchrun", double, workers=2).code == 0
    assert distgrow.train("one", double).code == 0
    assert (parameters(distgrow.folder / "torchrun") == parameters(run)).all()
    one = parameters(distgrow.folder / "one")
    assert (one - parameters(run)).norm() <= 1e-10 * one.norm()
    assert ledger(run) == ledger(distgrow.folder / "one")
    assert {step["world"] for step in events(run, "step")} == {2}


@pytest.mark.slow
def test_the_launch_script_on_the_head_finds_the_cluster_that_runs_there(distgrow: Commands, cluster: Hosts) -> None:
    run = distgrow.folder / "run"
    script, config = str(ROOT / "launch/ray_train.py"), str(ROOT / "configs/digits.yaml")
    done = cluster.run(1, sys.executable, script, config, *TINY, f"run.dir={run}", "launch.placement=SPREAD")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"(ip={cluster.address(2)}, pid=" in done.stdout + done.stderr or (
        f"(ip={cluster.address(3)}, pid=" in done.stdout + done.stderr
    )
    assert ledger(run)["applied"] == 1500


def test_the_launch_script_without_a_cluster_says_how_to_start_one(distgrow: Commands) -> None:
    distgrow.environment["RAY_TMPDIR"] = str(distgrow.folder)
    script = ROOT / "launch/ray_train.py"
    refused = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, str(script), f"run.dir={distgrow.folder}/run"],
        cwd=ROOT,
        env=distgrow.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip  Ray looks for clusters among all processes
    assert refused.returncode == 2, refused.stderr
    assert "launch.address=auto: no Ray cluster answers there; start one (ray start --head)" in refused.stderr


@pytest.mark.slow
def test_a_client_without_the_token_is_turned_away(distgrow: Commands, cluster: Hosts) -> None:
    stranger = replace(cluster, environment={**cluster.environment, "RAY_AUTH_TOKEN": "0" * 64})
    refused = stranger.run(1, RAY_COMMAND, "job", "submit", "--address", cluster.dashboard, "--", "true")
    assert refused.returncode != 0
    assert "uthenti" in refused.stdout + refused.stderr
