"""engine.kind=fsdp with ahead=1: outcomes that are told one update later, in shards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_ranks
from torch import nn
from untold_shards import FAULTY, PLANNED, loss, network
from waiting import check_updates_wait_for_nothing

from distgrow import FSDP, SGD, AdamW, Muon
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.distributed.world import joined
from distgrow.engine.fsdp.ahead import AheadFSDPEngine
from distgrow.engine.fsdp.engine import FSDPEngine
from distgrow.engine.skipping import looks_itself
from distgrow.optim.lamb import LAMB

OPTIMIZERS: dict[str, Any] = {
    "sgd": SGD(), "momentum": SGD(momentum=0.9, weight_decay=0.01, clip=0.3), "adamw": AdamW(clip=0.3), "muon": Muon(),
}  # fmt: skip


def several(kinds: Any, *few: str) -> list[Any]:
    """The names of some kinds, and as a slow test those of all."""
    return [list(few), pytest.param(sorted({*kinds} - {*few}), marks=pytest.mark.slow)]


@pytest.mark.parametrize("names", several(PLANNED, "sgd"), ids=" ".join)
def test_a_planned_run_is_the_same_to_the_bit_whether_the_host_waits_or_not(names: list[str], tmp_path: Path) -> None:
    in_ranks("untold_shards.py", str(tmp_path), "planned", *names, workers=2)


@pytest.mark.parametrize("names", several(FAULTY, "adamw"), ids=" ".join)
def test_what_one_rank_cannot_compute_moves_no_rank_and_is_told_one_update_later(
    names: list[str], tmp_path: Path
) -> None:
    in_ranks("untold_shards.py", str(tmp_path), "faulty", *names, workers=2)


@pytest.mark.slow
def test_measured_growth_decides_as_plain_torch_with_ahead_does(tmp_path: Path) -> None:
    in_ranks("untold_shards.py", str(tmp_path), "measured", workers=2)


@pytest.mark.slow
def test_a_run_goes_on_bit_by_bit_and_on_fewer_ranks(tmp_path: Path) -> None:
    in_ranks("untold_shards.py", str(tmp_path), "resumed", workers=2)
    in_ranks("untold_shards.py", str(tmp_path), "moved", workers=1)


@pytest.mark.parametrize("shard", ["full", "grad_op"])
@pytest.mark.parametrize(
    ("optimizer", "plan"),
    [
        ("sgd", {}), ("momentum", {"window": 20, "product": True}), ("muon", {"window": 20, "average": 0.1}),
        ("adamw", {"window": 20, "product": True, "average": 0.1}),
    ],
)  # fmt: skip
def test_no_update_waits_for_the_device_or_for_other_hosts(
    optimizer: str, plan: dict[str, Any], shard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(10)]
    given = Plan(batch=16, world=1, micro=8, accum=2, lr=0.01, stage=0, **plan)
    with joined("cpu", alone=True) as world:
        engine = AheadFSDPEngine(
            network(), loss, metrics=None, spec=FSDP(shard=shard, ahead=1), optimizer=OPTIMIZERS[optimizer], world=world
        )
        check_updates_wait_for_nothing(engine, given, batches, monkeypatch)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_steps_of_a_model_that_began_on_the_meta_device_are_skipped_by_fused_kernels(optimizer: str) -> None:
    """AdamW's others count steps on the host."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    with joined("cpu", alone=True) as world:
        engine = AheadFSDPEngine(
            model, loss, metrics=None, spec=FSDP(ahead=1), optimizer=OPTIMIZERS[optimizer], world=world
        )
        assert looks_itself(engine.optimizer)
        plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0)
        rows, labels = torch.randn(8, 6), torch.arange(8) % 3
        engine.update(plan, [(rows, labels)])
        before = [tensor.clone() for tensor in tensors(engine)]
        engine.update(plan, [(rows * float("nan"), labels)])
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(engine), strict=True))
        lost = engine.update(plan, [(rows, labels)])
        assert lost.told
        assert not lost.applied
        assert not any(torch.equal(a, b) for a, b in zip(before, tensors(engine), strict=True))


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_checkpoint_of_a_run_that_waited_on_the_meta_device_goes_on_by_fused_kernels(
    optimizer: str, tmp_path: Path
) -> None:
    plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0)
    rows, labels = torch.randn(8, 6), torch.arange(8) % 3
    with joined("cpu", alone=True) as world:
        engines: list[Any] = []
        for kind in (FSDPEngine, AheadFSDPEngine):
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
            spec = FSDP(ahead=kind.ahead)
            engines += [kind(model, loss, metrics=None, spec=spec, optimizer=OPTIMIZERS[optimizer], world=world)]
        before, engine = engines
        before.update(plan, [(rows, labels)])
        for name, content in before.snapshot().items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        engine.load(tmp_path)
        assert looks_itself(engine.optimizer)
        engine.update(plan, [(rows, labels)])
        kept = [tensor.clone() for tensor in tensors(engine)]
        engine.update(plan, [(rows * float("nan"), labels)])
        assert all(torch.equal(a, b) for a, b in zip(kept, tensors(engine), strict=True))


def tensors(engine: AheadFSDPEngine) -> list[torch.Tensor]:
    """Parameters and the optimizer's state."""
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return [*(parameter.detach() for parameter in engine.averaged().values()), *states]


@pytest.mark.parametrize(
    ("keys", "told"),
    [({"offload": True}, r"ahead=1.*offload=true.*offload=false"), ({"delay": 1}, r"delay=1.*engine.kind=torch")],
)
def test_what_waits_by_itself_is_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FSDP(ahead=1, **keys)


def test_optimizers_that_cannot_skip_a_step_are_refused() -> None:
    FSDP().check_optimizer(LAMB())
    with pytest.raises(ConfigError, match=r"engine.ahead=1.*optimizer.kind=lamb.*engine.ahead=0"):
        FSDP(ahead=1).check_optimizer(LAMB())
