"""Asynchronous workers as Ray actors, killed, lagging and stopped: against plain training and their own counts."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")

import torch  # noqa: E402
from conftest import Commands, events, ledger  # noqa: E402
from small_models import Drawing, line  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from distgrow import SGD, Async, Hook, RunSpec, Torch, budget, constant_lr, every, exponential, fit  # noqa: E402
from distgrow.core.errors import ConfigError  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]
SAMPLES = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this process, with room for three workers."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def data(rows: int = 64) -> list[tuple[Tensor, int]]:
    numbers = torch.Generator().manual_seed(1)
    return [(torch.randn(3, generator=numbers, dtype=torch.float64), k % 2) for k in range(rows)]


def loss_at(folder: Path, linear: bool, fault: "Callable[[Path, int], None] | None" = None) -> Any:
    """A loss that writes down in `folder` the rows it is computed of in each worker, and what happens to one of them.

    It is a closure: workers do not know this file.
    """
    tester = os.getpid()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if os.getpid() != tester and torch.is_grad_enabled():
            with (folder / f"rows.{os.getpid()}").open("a") as file:
                file.write(f"{len(batch[0])}\n")
            if fault is not None:
                fault(folder, (folder / f"rows.{os.getpid()}").read_text().count("\n"))
        if linear:
            return model(batch[0]).mean()
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return loss


def killing() -> "Callable[[Path, int], None]":
    """SIGKILL for the first worker that comes to its third batch."""

    def fault(folder: Path, batches: int) -> None:
        if batches == 3 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def lagging(seconds: float) -> "Callable[[Path, int], None]":
    """Every second batch of the first worker takes `seconds`."""

    def fault(folder: Path, batches: int) -> None:
        if batches == 1 and not (folder / "slow").exists():
            (folder / "slow").write_text(str(os.getpid()))
        if batches % 2 == 0 and (folder / "slow").read_text() == str(os.getpid()):
            time.sleep(seconds)
        time.sleep(0.01)

    return fault


def counted(folder: Path) -> int:
    """The rows that all workers have written down."""
    return sum(int(row) for file in folder.glob("rows.*") for row in file.read_text().split())


def run(folder: Path, model: nn.Module, engine: Any, loss: Any, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "growth": exponential(4, 2, 8), "stages": every(samples=120), "lr": constant_lr(0.05), "optimizer": SGD(),
        "budget": budget(samples=SAMPLES), "run": RunSpec(dir=str(folder / "run")), **more,
    }  # fmt: skip
    return fit(model, loss, data(), engine=engine, **settings)


def state(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def plain(folder: Path) -> list[Tensor]:
    """What a run without workers ends with, of a loss whose gradients do not depend on the parameters."""
    model = line()
    run(folder / "plain", model, Torch(precision="float64"), loss_at(folder, linear=True))
    return state(model)


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(one, other, strict=True))


def test_one_actor_is_plain_training_to_the_last_bit_with_buffers_dropout_and_momentum(
    cluster: None, tmp_path: Path
) -> None:
    found: list[list[Tensor]] = []
    for engine in (Torch(precision="float64"), Async(precision="float64", workers=1)):
        model, optimizer = Drawing(), SGD(momentum=0.9, weight_decay=0.1, clip=0.2)
        loss = loss_at(tmp_path, linear=False)
        result = run(tmp_path / engine.kind, model, engine, loss, optimizer=optimizer)
        assert result.progress.ledger.applied == result.progress.ledger.total == SAMPLES
        found.append(state(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counted(tmp_path) == SAMPLES


def test_a_worker_that_is_killed_loses_and_repeats_no_sample(cluster: None, tmp_path: Path) -> None:
    model = line()
    engine = Async(precision="float64", workers=2, adaptive=False)
    result = run(tmp_path, model, engine, loss_at(tmp_path, linear=True, fault=killing()))
    book = result.progress.ledger
    assert (tmp_path / "killed").exists()
    assert book.applied == SAMPLES
    assert book.discarded in (4, 8)
    assert book.total == counted(tmp_path)
    assert close(state(model), plain(tmp_path))


def test_what_a_lagging_worker_brings_too_late_is_dropped_and_counted(cluster: None, tmp_path: Path) -> None:
    model = line()
    engine = Async(precision="float64", workers=2, drop_after=2)
    result = run(
        tmp_path, model, engine, loss_at(tmp_path, linear=True, fault=lagging(0.25)), budget=budget(samples=360)
    )
    book, skips = result.progress.ledger, events(tmp_path / "run", "skip")
    assert book.applied == 360
    assert book.discarded > 0
    assert book.total == counted(tmp_path)
    assert skips
    assert all(line["late"] and line["delay"] > 2 for line in skips)
    assert max(line.get("delay", 0) for line in events(tmp_path / "run", "step")) <= 2


class Stops(Hook):
    """Requests a stop at an update."""

    def after_update(self, update: Any) -> None:
        if update.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_another_number_of_workers_exactly_counted(cluster: None, tmp_path: Path) -> None:
    model, loss = line(), loss_at(tmp_path, linear=True)
    first = run(tmp_path, model, Async(precision="float64", workers=3, adaptive=False), loss, hooks=[Stops()])
    assert not first.finished
    other = line()
    last = run(tmp_path, other, Async(precision="float64", workers=2, adaptive=False), loss, resume=True)
    book = last.progress.ledger
    assert (book.applied, book.replayed, book.total) == (SAMPLES, 0, SAMPLES)
    assert counted(tmp_path) == SAMPLES
    assert close(state(other), plain(tmp_path))


def test_what_cannot_be_pickled_is_refused(cluster: None, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file, pytest.raises(ConfigError, match=r"engine.kind=async.*pickle"):

        def loss(model: nn.Module, batch: Any) -> Tensor:
            file.flush()
            return model(batch[0]).mean()

        run(tmp_path, line(), Async(precision="float64"), loss)


@pytest.mark.parametrize("resources", [{"CPU": 1, "quantum": 2}, {"CPU": 4}])
def test_resources_that_no_host_has_are_named_and_nothing_is_lost(
    cluster: None, resources: dict[str, float], tmp_path: Path
) -> None:
    engine = Async(precision="float64", resources=resources, wait_s=1)
    most = {"quantum": "CPU: 3, quantum: 0"}.get(list(resources)[-1], "CPU: 3")
    with pytest.raises(ConfigError, match=rf"engine.resources=.*the most that any has is {most}: lower"):
        run(tmp_path, line(), engine, loss_at(tmp_path, linear=True))
    assert counted(tmp_path) == 0
    assert run(tmp_path, line(), Async(precision="float64"), loss_at(tmp_path, linear=True), resume=True).finished


@pytest.mark.slow
def test_an_error_of_the_loss_in_a_worker_is_raised_as_it_is(cluster: None, tmp_path: Path) -> None:
    tester = os.getpid()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if os.getpid() != tester:
            raise ArithmeticError("rotten")
        return model(batch[0]).mean()

    with pytest.raises(ArithmeticError, match="rotten"):
        run(tmp_path, line(), Async(precision="float64"), loss)


@pytest.mark.slow
def test_a_config_trains_with_workers_beside_a_rank_of_ray_train(distgrow: Commands) -> None:
    words = ("launch.kind=ray", "engine={kind: async, workers: 2}", "growth={kind: exponential, start: 8, cap: 32}")
    finished = distgrow.train("run", *words)
    assert finished.code == 0, finished.err
    book = ledger(distgrow.folder / "run")
    assert (book["applied"], sum(book.values())) == (1500, 1500)
    assert any(line.get("delay") for line in events(distgrow.folder / "run", "step"))
    refused = distgrow("verify", str(distgrow.folder / "run/config.yaml"))
    assert refused.code == 2
    assert "engine.kind=async" in refused.err
