"""Adaptive growth on real gradients: what was interrupted goes on with the same moves, to the same parameters."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.budget import Budget
from distgrow.core.lr import LR
from distgrow.core.noise_stats import Measuring
from distgrow.core.stages import MinStage
from distgrow.data.datasets import digits
from distgrow.data.spec import Loading
from distgrow.engine.spec import Torch
from distgrow.growth import Growth
from distgrow.growth.adascale import AdaScale
from distgrow.growth.critical_batch import CriticalBatch
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.growth.progress_test import ProgressTest
from distgrow.growth.tau_adaptive import TauAdaptive
from distgrow.growth.temperature import Plateau, Temperature
from distgrow.optim.adamw import AdamW
from distgrow.training.fit import fit
from distgrow.training.result import Result
from distgrow.training.spec import RunSpec

DWELL = MinStage(samples=100, updates=4)
GROWTHS: dict[str, Growth] = {
    "tracking": CriticalBatch(start=8, cap=32, kappa=3.0, min_stage=DWELL),
    "gns": NoiseScale(start=8, cap=64, min_stage=DWELL),
    "gns, preconditioned": NoiseScale(start=8, cap=64, share=3.0, min_stage=DWELL, norm="preconditioned"),
    "tau": TauAdaptive(start=8, cap=64, min_stage=DWELL, smoothness=1, largest_smoothness=20, mu=0.1, epsilon=1),
    "progress": ProgressTest(start=8, cap=64, min_stage=MinStage(samples=300)),
    "adaptive": NormThreshold(start=8, cap=64, every=9, epsilon=1.5, norm="estimated"),
    "adaptive, exact": NormThreshold(start=8, cap=64, every=9, epsilon=1.5),
    "temperature": Temperature(start=8, cap=64, share=0.5, lr_max=1.0, min_stage=DWELL),
    "plateau": Temperature(start=8, cap=16, plateau=Plateau(samples=200, fall=0.5), min_stage=DWELL),
    "adascale": AdaScale(start=8, scale=4),
}


class Bomb:
    """A tracker that ends a run after so many updates, as a fault would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def log(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] >= self._step:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(1), batch[1])


def trained(growth: Growth, folder: Path, *, resume: bool = False, bomb: int | None = None, workers: int = 0) -> Any:
    """The result of a run of 1,500 digits, and the parameters that it ends with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    spec = RunSpec(
        dir=str(folder), checkpoint=Checkpointing(every_steps=13), noise=Measuring(every=1, window=30),
        loader=Loading(workers=workers),
    )  # fmt: skip
    by_adam = getattr(growth, "norm", "") == "preconditioned"
    stages = {"growth": growth, "lr": LR(base=0.2), "budget": Budget(samples=1500), "engine": Torch(max_micro=16)}
    stages |= {"optimizer": AdamW(), "lr": LR(base=0.01)} if by_adam else {}
    result = fit(
        model, loss, digits()[0], run=spec, resume=resume, trackers=[] if bomb is None else [Bomb(bomb)], **stages
    )
    return result, [parameter.detach() for parameter in model.parameters()]


def alike(one: tuple[Result, list[Tensor]], other: tuple[Result, list[Tensor]]) -> bool:
    """Whether two runs ended alike, to the last bit, but for work that was done twice."""
    ledgers = [replace(result.progress.ledger, replayed=0) for result, _ in (one, other)]
    ends = [replace(result.progress, ledger=ledger) for (result, _), ledger in zip((one, other), ledgers, strict=True)]
    return ends[0] == ends[1] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("kind", [kind for kind in GROWTHS if kind != "gns"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(kind: str, tmp_path: Path) -> None:
    whole = trained(GROWTHS[kind], tmp_path / "whole")
    moved = (whole[0].progress.stage, whole[0].progress.policy.get("drops", 0))
    assert moved > (0, 0) or kind == "adascale"
    with pytest.raises(KeyboardInterrupt):
        trained(GROWTHS[kind], tmp_path / "cut", bomb=32)
    again = trained(GROWTHS[kind], tmp_path / "cut", resume=True)
    assert again[0].progress.ledger.replayed > 0
    assert alike(whole, again)


@pytest.mark.parametrize("kind", ["progress", "gns"])
def test_samples_that_were_loaded_ahead_are_dropped_where_a_move_comes(kind: str, tmp_path: Path) -> None:
    direct, ahead = (trained(GROWTHS[kind], tmp_path / f"{count}", workers=count) for count in (0, 2))
    assert direct[0].progress.stage > 0
    assert alike(direct, ahead)
