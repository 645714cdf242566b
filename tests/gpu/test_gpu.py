"""One GPU: the same run as on the CPU, to floating-point tolerance; `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Commands, ledger, parameters
from torch import Tensor, nn

from distgrow import FSDP, SGD, AdamW, Muon, Torch
from distgrow.core.plan import Plan
from distgrow.distributed.world import World, joined
from distgrow.engine.ahead import AheadEngine
from distgrow.engine.fsdp.ahead import AheadFSDPEngine
from distgrow.engine.protocol import Engine
from distgrow.optim import OptimizerSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_gpu_run_agrees_with_the_cpu(distgrow: Commands) -> None:
    double = "engine.precision=float64"
    assert distgrow.train("cpu", double, "engine.device=cpu").code == 0
    assert distgrow.train("gpu", double, "engine.device=cuda").code == 0
    one, other = parameters(distgrow.folder / "cpu"), parameters(distgrow.folder / "gpu").cpu()
    assert (one - other).norm() <= 1e-9 * one.norm()
    assert ledger(distgrow.folder / "cpu") == ledger(distgrow.folder / "gpu")


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.precision=bfloat16", "model={kind: resnet8, norm: batch}"),
        ("engine.compile=true", "engine.max_micro=8"),
        ("run.loader.workers=2", "optimizer={kind: adamw}"),
    ],
)
def test_a_gpu_run_finishes_and_resumes(distgrow: Commands, overrides: tuple[str, ...]) -> None:
    assert distgrow.train("gpu", *overrides).code == 0
    assert distgrow.train("gpu", *overrides, resume=True).code == 0
    assert ledger(Path(distgrow.folder / "gpu"))["applied"] == 1500


def check_fifty_updates(engine: Engine, device: torch.device, *, product: bool) -> None:
    """Make fifty updates, after two, in which torch raises an error wherever the host would wait."""
    plan = Plan(batch=32, world=1, micro=16, accum=2, lr=0.01, stage=0, window=20, product=product, average=0.1)
    batches = [(torch.randn(16, 16, device=device), torch.randint(4, (16,), device=device)) for _ in range(2)]
    for _ in range(2):
        engine.update(plan, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcomes = [engine.update(plan, batches) for _ in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(outcome.told and outcome.loss > 0 for outcome in outcomes)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), AdamW(), Muon()], ids=lambda spec: spec.name)
def test_no_update_waits_for_the_gpu_once_one_of_its_size_was_made(optimizer: OptimizerSpec) -> None:
    """torch raises an error wherever the host would wait, in fifty updates with growth's statistics and an average."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 4))
    engine = AheadEngine(model, loss, spec=Torch(ahead=1), optimizer=optimizer, world=World(device=device))
    check_fifty_updates(engine, device, product=not optimizer.per_tensor)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), AdamW(clip=0.5), Muon()], ids=lambda spec: spec.name)
def test_no_sharded_update_waits_for_the_gpu_once_a_step_was_made(optimizer: OptimizerSpec) -> None:
    """As above, in one rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 4))
    with joined("cuda", alone=True) as world:
        spec = FSDP(ahead=1)
        engine = AheadFSDPEngine(model, loss, metrics=None, spec=spec, optimizer=optimizer, world=world)
        check_fifty_updates(engine, world.device, product=not optimizer.per_tensor)


def test_a_run_that_does_not_wait_is_the_same_on_a_gpu(distgrow: Commands) -> None:
    for name, ahead in (("waits", 0), ("goes", 1)):
        assert distgrow.train(name, "engine.device=cuda", f"engine.ahead={ahead}").code == 0
    assert torch.equal(parameters(distgrow.folder / "waits"), parameters(distgrow.folder / "goes"))
    assert ledger(distgrow.folder / "waits") == ledger(distgrow.folder / "goes")


def test_verify_holds_on_a_gpu(distgrow: Commands) -> None:
    config = str(Path(__file__).parents[2] / "configs/digits.yaml")
    assert distgrow("verify", config, "engine.precision=float64", "engine.device=cuda").code == 0
