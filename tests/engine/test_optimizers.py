"""Every built-in optimizer: torch's own steps, and the same run after an interruption."""

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny import data, loss, network
from torch import Tensor

from distgrow import (
    Adadelta,
    Adafactor,
    Adagrad,
    NAdam,
    RMSprop,
    RunSpec,
    budget,
    constant_lr,
    every,
    exponential,
    fit,
)
from distgrow.checkpoint.spec import Checkpointing
from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.engine.torch import TorchEngine
from distgrow.optim import Optimizer, OptimizerSpec, trust_ratio
from distgrow.optim.muon import Muon

RATES = (0.1, 0.02, 0.02, 0.3, 0.05, 0.01)
KINDS = [spec for spec in get_args(get_args(Optimizer)[0]) if not spec.model_fields.get("target")]


def batches() -> list[tuple[Tensor, Tensor]]:
    rows = data(8 * len(RATES))
    parts = [rows[8 * k : 8 * k + 8] for k in range(len(RATES))]
    return [(torch.stack([row for row, _ in part]), torch.tensor([label for _, label in part])) for part in parts]


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        (Adadelta(rho=0.8, weight_decay=0.1), lambda p: torch.optim.Adadelta(p, rho=0.8, weight_decay=0.1)),
        (Adagrad(weight_decay=0.1), lambda p: torch.optim.Adagrad(p, weight_decay=0.1)),
        (
            RMSprop(alpha=0.9, momentum=0.5, centered=True, weight_decay=0.1),
            lambda p: torch.optim.RMSprop(p, alpha=0.9, momentum=0.5, centered=True, weight_decay=0.1),
        ),
        (
            NAdam(beta1=0.8, beta2=0.95, momentum_decay=0.01, weight_decay=0.1),
            lambda p: torch.optim.NAdam(p, betas=(0.8, 0.95), momentum_decay=0.01, weight_decay=0.1),
        ),
        (Adafactor(d=2.0, weight_decay=0.1), lambda p: torch.optim.Adafactor(p, d=2.0, weight_decay=0.1)),
        *[(spec(), made) for spec, made in (
            (Adadelta, torch.optim.Adadelta), (Adagrad, torch.optim.Adagrad), (RMSprop, torch.optim.RMSprop),
            (NAdam, torch.optim.NAdam), (Adafactor, torch.optim.Adafactor),
        )],
    ],
    ids=lambda value: value.name if isinstance(value, OptimizerSpec) else "",
)  # fmt: skip
def test_steps_are_those_of_torchs_own(spec: OptimizerSpec, own: Callable[[Any], torch.optim.Optimizer]) -> None:
    ours, theirs = network(), network()
    engine, optimizer = TorchEngine(ours, loss, optimizer=spec), own(theirs.parameters())
    for rate, batch in zip(RATES, batches(), strict=True):
        engine.update(Plan(batch=8, world=1, micro=8, accum=1, lr=rate, stage=0), [batch])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss(theirs, batch).backward()
        optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def trained(spec: OptimizerSpec, folder: Path, *, resume: bool = False) -> list[Tensor]:
    model = network()
    fit(
        model, loss, data(), test=data(20), growth=exponential(4, 2, 16), stages=every(samples=40),
        lr=constant_lr(0.03), budget=budget(samples=200), optimizer=spec, resume=resume,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=4, keep=20)),
    )  # fmt: skip
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_one_that_never_stopped(kind: type[OptimizerSpec], tmp_path: Path) -> None:
    spec = kind(clip=0.5)
    whole = trained(spec, tmp_path)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    for checkpoint in kept[len(kept) // 2 :]:
        shutil.rmtree(checkpoint)
    again = trained(spec, tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, network().parameters(), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("{kind: adadelta, rho: 1}", "optimizer.*rho"),
        ("{kind: adagrad, eps: 0}", "optimizer.*eps"),
        ("{kind: rmsprop, alpha: .nan}", "optimizer.*alpha"),
        ("{kind: nadam, beta1: -0.1}", "optimizer.*beta1"),
        ("{kind: adafactor, d: 0.5}", "optimizer.*d"),
        ("{kind: adafactor, beta2_decay: 0}", "optimizer.*beta2_decay"),
        ("{kind: lars, trust: 0}", "optimizer.*trust"),
        ("{kind: clars, max_ratio: 0}", "optimizer.*max_ratio"),
        ("{kind: lamb, exclude: [{}]}", "optimizer.*exclude.*match or ndim"),
        ("{kind: muon, momentum: 1}", "optimizer.*momentum"),
        ("{kind: muon, exclude: [{match: '('}]}", "optimizer.*exclude.*no regular expression"),
    ],
)
def test_what_is_no_setting_is_refused_by_its_key(optimizer: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(apply({"budget": {"epochs": 4}}, f"optimizer={optimizer}"))


def test_a_torch_without_muon_is_refused_for_muon_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    monkeypatch.setitem(sys.modules, "distgrow.optim.joined", None)
    assert "LAMB" in runpy.run_path(trust_ratio.__file__)
    model = network()
    with pytest.raises(ConfigError, match="muon needs torch 2.9 or later.*adamw"):
        Muon().made(dict(model.named_parameters()), model)
