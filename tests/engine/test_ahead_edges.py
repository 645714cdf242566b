"""Outcomes that are told one update later, at the ends of runs and stages and over a stop."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import data, loss, network
from torch import Tensor, nn

from distgrow import SGD, AdamW, Hook, RunSpec, Torch, budget, constant, every, exponential, fit, sqrt_lr
from distgrow.core.errors import ConfigError, Diverged
from distgrow.core.optimizer_plan import AtGrowth
from distgrow.core.plan import Plan
from distgrow.engine.ahead import AheadEngine

ROWS = data(200)


def run(folder: Path, *, ahead: int, delay: int = 0, **more: Any) -> tuple[nn.Module, Any]:
    settings: dict[str, Any] = {
        "growth": exponential(4, 2, 16), "stages": every(samples=40), "lr": sqrt_lr(0.02), "optimizer": SGD(),
        "budget": budget(samples=160), "loss": loss, "train": ROWS, "run": RunSpec(dir=str(folder)), **more,
    }  # fmt: skip
    model = settings.pop("model", None) or network()
    precision = settings.pop("precision", "float64")  # "float32" leaves parameters as they are
    engine = Torch(precision=precision, max_micro=16, ahead=ahead, delay=delay)  # pyright: ignore[reportArgumentType]
    return model, fit(model, settings.pop("loss"), settings.pop("train"), engine=engine, **settings)


def of(folder: Path, event: str) -> list[int]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["samples"] for line in found if line["event"] == event]


@pytest.mark.parametrize("delay", [0, 1])
def test_a_last_update_that_is_never_finite_ends_the_run_after_max_skips(delay: int, tmp_path: Path) -> None:
    rows = [(row * float("nan"), label) for row, label in ROWS]
    spec = RunSpec(dir=str(tmp_path), max_skips=3)
    with pytest.raises(Diverged, match="3 updates in a row"):
        run(tmp_path, ahead=1, delay=delay, train=rows, growth=constant(4), budget=budget(steps=1), run=spec)
    assert of(tmp_path, "skip") == [4, 8, 12]


class Stop(Hook):
    """Asks the run's process to stop after its first update."""

    def after_update(self, update: Any) -> None:
        del update
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_that_was_stopped_goes_on_to_its_end(delay: int, tmp_path: Path) -> None:
    _, stopped = run(tmp_path, ahead=1, delay=delay, hooks=[Stop()])
    assert not stopped.finished
    _, result = run(tmp_path, ahead=1, delay=delay, resume=True)
    assert result.finished
    assert len(of(tmp_path, "end")) == 2


def test_moments_that_are_forgotten_at_growth_stay_forgotten_if_that_update_is_skipped(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def looking(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            seen.extend(batch[0])
        return loss(model, batch)

    run(tmp_path / "order", ahead=0, loss=looking)
    bad = seen[-160:][40]  # of the first update of the second stage
    rows = [(row * float("nan") if torch.equal(row, bad) else row, label) for row, label in ROWS]
    optimizer = SGD(momentum=0.9, at_growth=AtGrowth(moments="reset"))
    found = [run(tmp_path / f"{ahead}", ahead=ahead, train=rows, optimizer=optimizer) for ahead in (0, 1)]
    assert of(tmp_path / "1", "skip") == of(tmp_path / "0", "skip") == [48]
    (waits, known), (goes, told) = found
    assert known.progress.ledger == told.progress.ledger
    assert all(torch.equal(a, b) for a, b in zip(waits.parameters(), goes.parameters(), strict=True))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_statistics_are_not_sent_in_half_precision(kind: torch.dtype, tmp_path: Path) -> None:
    rows = [(row.to(kind), label) for row, label in ROWS]
    with pytest.raises(ConfigError, match="half precision"):
        run(tmp_path, ahead=1, delay=1, precision="float32", model=network().to(kind), train=rows)


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), AdamW()])
def test_a_checkpoint_of_steps_that_were_not_fused_goes_on_and_skips(optimizer: Any) -> None:
    rows, labels = (torch.stack([row for row, _ in ROWS[:8]]), torch.tensor([label for _, label in ROWS[:8]]))
    plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0)
    before, engine = (
        AheadEngine(network(), loss, spec=Torch(ahead=1, precision="float64"), optimizer=optimizer) for _ in range(2)
    )
    before.update(plan, [(rows, labels)])
    state = before.optimizer.state_dict()
    state["param_groups"] = [{**group, "fused": None} for group in state["param_groups"]]
    engine.optimizer.load_state_dict(state)
    for factor in (1.0, float("nan"), 1.0):
        kept = [parameter.detach().clone() for parameter in engine.model.parameters()]
        engine.update(plan, [(rows * factor, labels)])
        same = [torch.equal(*pair) for pair in zip(kept, engine.model.parameters(), strict=True)]
        assert all(same) if factor != factor else not any(same)
