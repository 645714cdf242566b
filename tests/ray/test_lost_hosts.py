"""Whole hosts are lost in the middle of a run: killed, cut off, the head itself; the run ends with the same bits."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("ray", reason="needs the extra 'ray'")

from conftest import Commands, events
from disturbed import HERE, assert_resumed, assert_same, ranks_at_gate, start, undisturbed_run, until, words
from hosts import RAY_COMMAND, Hosts, hosts, unable

from distgrow.checkpoint.export import weights_of

REASON = unable()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]
#: Ray's own limits (a minute or two by default), so that the tests need not wait for them.
QUICK = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "8",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """A head without CPUs, two hosts for the workers, and one that nobody uses yet."""
    with hosts((0, 2, 2), spare=1, **QUICK) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks under torchrun that nothing happens to."""
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"))


def test_a_killed_host_costs_time_and_the_other_one_takes_its_worker(
    distgrow: Commands, cluster: Hosts, undisturbed: Path
) -> None:
    folder, log = distgrow.folder, distgrow.folder / "log"
    driver = start(cluster, folder, "launch.placement=SPREAD", "launch.max_failures=1")
    hosts_used = [cluster.of(pid) for pid in ranks_at_gate(cluster, folder)]
    assert sorted(hosts_used) == [2, 3]
    cluster.kill(hosts_used[1])
    (folder / "gate").touch()
    assert driver.wait(300) == 0, log.read_text()
    assert_same(folder / "run", undisturbed)
    cluster.start_ray(hosts_used[1], cpus=2)


def test_a_host_with_half_of_a_sharded_model_is_killed_and_the_run_ends_with_the_same_bits(
    distgrow: Commands, cluster: Hosts
) -> None:
    """`engine.kind=fsdp`: what the lost host held comes back from the shards of the last checkpoint."""
    whole, folder, log = distgrow.folder / "whole", distgrow.folder, distgrow.folder / "log"
    whole.mkdir()
    undisturbed = undisturbed_run(whole, "engine.kind=fsdp")
    driver = start(cluster, folder, "launch.placement=SPREAD", "launch.max_failures=1", "engine.kind=fsdp")
    hosts_used = [cluster.of(pid) for pid in ranks_at_gate(cluster, folder)]
    cluster.kill(hosts_used[1])
    (folder / "gate").touch()
    assert driver.wait(300) == 0, log.read_text()
    assert_resumed(folder / "run", undisturbed)
    ended, expected = weights_of(folder / "run").state, weights_of(undisturbed).state
    assert all(torch.equal(value, expected[name]) for name, value in ended.items())
    cluster.start_ray(hosts_used[1], cpus=2)


def test_a_host_that_is_to_be_taken_away_is_left_after_a_checkpoint(
    distgrow: Commands, cluster: Hosts, undisturbed: Path
) -> None:
    folder, log = distgrow.folder, distgrow.folder / "log"
    rarely = "run.checkpoint={every_s: 3600, keep: 3}"
    slowly = f"task.args={{gate: '{folder / 'gate'}', pause_s: 0.3}}"
    driver = start(cluster, folder, "launch.placement=SPREAD", rarely, slowly)
    drained = cluster.of(ranks_at_gate(cluster, folder)[0])
    node, head = cluster.nodes()[cluster.address(drained)]["nodeId"], f"{cluster.address(1)}:6379"
    notice = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=12")
    told = cluster.run(1, RAY_COMMAND, "drain-node", f"--address={head}", f"--node-id={node}", *notice)
    assert told.returncode == 0, told.stdout + told.stderr
    (folder / "gate").touch()
    assert driver.wait(300) == 0, log.read_text()
    assert_same(folder / "run", undisturbed)
    resumed = events(folder / "run", "resume")[0]
    assert resumed["step"] >= 20  # not from the beginning, the only other checkpoint that there was
    cluster.kill(drained)
    cluster.start_ray(drained, cpus=2)


def test_a_host_that_is_cut_off_stops_writing_and_another_takes_over(
    distgrow: Commands, cluster: Hosts, undisturbed: Path
) -> None:
    folder, log = distgrow.folder, distgrow.folder / "log"
    driver = start(cluster, folder, "launch.placement=STRICT_SPREAD", "launch.max_failures=1")
    first, _ = ranks_at_gate(cluster, folder)
    assert sorted(cluster.of(pid) for pid in ranks_at_gate(cluster, folder)) == [2, 3]
    cluster.unplug(cluster.of(first))  # the rank that writes, and holds the folder's lock
    (folder / "gate").touch()
    cluster.start_ray(4, cpus=2)
    assert psutil.pid_exists(first)
    assert driver.wait(300) == 0, log.read_text()
    assert not psutil.pid_exists(first)
    assert_same(folder / "run", undisturbed)


def test_a_head_that_is_lost_takes_the_run_down_and_a_new_one_resumes_it(
    distgrow: Commands, cluster: Hosts, undisturbed: Path
) -> None:
    folder = distgrow.folder
    driver = start(cluster, folder)
    workers = ranks_at_gate(cluster, folder)
    used = {cluster.of(pid) for pid in workers}
    cluster.kill(1)
    assert driver.wait(10) != 0  # it ran on the head
    until(lambda: not any(map(psutil.pid_exists, workers)), 60, "Ray's workers end themselves without a head")
    (folder / "gate").touch()
    assert not events(folder / "run", "end")
    for number in (2, 3, 4):
        cluster.kill(number)  # Ray's own processes there may take longer to end
    for number in (1, *used):
        cluster.start_ray(number, cpus=0 if number == 1 else 2)
    submit = [RAY_COMMAND, "job", "submit", "--address", cluster.dashboard, "--"]
    done = cluster.run(1, *submit, "env", f"PYTHONPATH={HERE}", *words(folder, "--auto-resume"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(folder / "run", undisturbed)
