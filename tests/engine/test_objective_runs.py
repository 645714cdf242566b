"""A run with growth.objective is, to the bit, the run with the numbers that it decides; so is one that is resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow import auto, budget, late, matched, objective
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR
from distgrow.data.datasets import digits
from distgrow.engine.spec import Torch
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.objective import Objective
from distgrow.training.fit import fit
from distgrow.training.result import Result
from distgrow.training.spec import RunSpec

AIM = objective(1, 16, 0.01, 1600)  # b* = √(16 · 16)
POLICIES = {"auto": auto, "late": late, "matched": matched}


class Bomb:
    """A tracker that ends a run after so many updates, as a fault would."""

    def log(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] >= 32:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(1), batch[1])


def trained(
    growth: GrowthPolicy, folder: Path, *, resume: bool = False, bomb: bool = False
) -> tuple[Result, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    spec = RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=13))
    result = fit(
        model, loss, digits()[0], growth=growth, lr=LR(base=0.2), budget=budget(samples=1500), run=spec, resume=resume,
        engine=Torch(max_micro=16), trackers=[Bomb()] if bomb else [],
    )  # fmt: skip
    return result, [parameter.detach() for parameter in model.parameters()]


def recorded(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["growth"]


@pytest.mark.parametrize("kind", sorted(POLICIES))
def test_it_is_the_run_with_the_numbers_that_it_decides_whole_and_resumed(kind: str, tmp_path: Path) -> None:
    growth = POLICIES[kind](objective=AIM)
    by_hand, one = trained(POLICIES[kind](8, 32), tmp_path / "hand")
    assert by_hand.progress.stage > 0
    aimed, other = trained(growth, tmp_path / "aimed")
    with pytest.raises(KeyboardInterrupt):
        trained(growth, tmp_path / "cut", bomb=True)
    again, third = trained(growth, tmp_path / "cut", resume=True)
    assert again.progress.ledger.replayed > 0
    for parameters in (other, third):
        assert all(torch.equal(a, b) for a, b in zip(one, parameters, strict=True))
    assert aimed.progress == by_hand.progress
    assert again.progress.ledger.applied == by_hand.progress.ledger.applied


def test_the_run_folder_holds_what_is_decided_and_from_what_and_another_objective_does_not_resume(
    tmp_path: Path,
) -> None:
    trained(matched(objective=AIM), tmp_path / "run")
    growth = recorded(tmp_path / "run")
    assert (growth["start"], growth["cap"], Objective(**growth["objective"])) == (8, 32, AIM)
    with pytest.raises(ConfigError, match=r"growth\.objective\.workers: 1 in the folder, 2 now"):
        trained(matched(objective=objective(2, 16, 0.01, 1600)), tmp_path / "run", resume=True)


def test_a_run_folder_from_before_the_key_is_resumed(tmp_path: Path) -> None:
    whole, one = trained(matched(8, 32), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(matched(8, 32), tmp_path / "old", bomb=True)
    config = tmp_path / "old/config.yaml"
    before = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert before["growth"].pop("objective") is None
    config.write_text(yaml.safe_dump(before, sort_keys=False), encoding="utf-8")
    again, other = trained(matched(8, 32), tmp_path / "old", resume=True)
    assert again.progress.ledger.applied == whole.progress.ledger.applied
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
