"""An average of the parameters: against plain means, beside training that it must not change, and across a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgrow import RunSpec, budget, constant_lr, ema, every, exponential, fit, tail
from distgrow.checkpoint.spec import Checkpointing
from distgrow.config.load import apply, parse
from distgrow.core.average import Average
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.engine.torch import TorchEngine


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(rows: int = 64) -> list[tuple[Tensor, int]]:
    numbers = torch.Generator().manual_seed(1)
    return [(torch.randn(3, generator=numbers, dtype=torch.float64), k % 2) for k in range(rows)]


def batch_of(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([row for row, _ in rows]), torch.tensor([label for _, label in rows])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_an_engine_averages_parameters_and_statistics_and_gives_the_live_ones_back() -> None:
    model, weights = network(), [1.0, 0.5, 0.0, 0.25]
    engine, expected = TorchEngine(model, loss), dict[str, Tensor]()
    for k, weight in enumerate(weights):
        plan = Plan(batch=16, world=1, micro=16, accum=1, lr=0.3, stage=0, average=weight)
        engine.update(plan, [batch_of(data()[16 * k : 16 * k + 16])])
        for name, value in state(model).items():
            before = expected.get(name, value)
            expected[name] = before + weight * (value - before) if value.is_floating_point() else value
    live = state(model)
    with engine.at_average() as there:
        assert there
        assert all(torch.allclose(value, expected[name], rtol=1e-12) for name, value in state(model).items())
        assert any(not torch.equal(value, live[name]) for name, value in state(model).items())
    assert all(torch.equal(value, live[name]) for name, value in state(model).items())


def test_an_update_that_is_not_applied_is_not_taken_in() -> None:
    model = network()
    engine = TorchEngine(model, loss)
    plan = Plan(batch=4, world=1, micro=4, accum=1, lr=0.3, stage=0, average=1.0)
    rows, labels = batch_of(data(4))
    assert not engine.update(plan, [(rows * float("nan"), labels)]).applied
    with engine.at_average() as there:
        assert not there


def trained(folder: Path, *, average: Average | None, resume: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """A run over three stages; its model and its last evaluation."""
    model = network()
    fit(
        model, loss, data(), test=data(20), growth=exponential(4, 2, 16), stages=every(samples=40), lr=constant_lr(0.3),
        budget=budget(samples=200), average=average, resume=resume,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=4, keep=20)),
    )  # fmt: skip
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return model, [line for line in lines if line["event"] == "eval"][-1]


@pytest.mark.parametrize("average", [ema(samples=50), ema(), tail(0.5)], ids=str)
def test_training_does_not_depend_on_an_average_and_a_resume_keeps_it(average: Average, tmp_path: Path) -> None:
    plain, _ = trained(tmp_path / "plain", average=None)
    model, whole = trained(tmp_path / "run", average=average)
    assert all(torch.equal(a, b) for a, b in zip(state(plain).values(), state(model).values(), strict=True))
    assert whole["average/loss"] != whole["loss"]
    kept = sorted((tmp_path / "run/checkpoints").iterdir())
    for checkpoint in kept[len(kept) // 2 :]:
        shutil.rmtree(checkpoint)
    _, again = trained(tmp_path / "run", average=average, resume=True)
    assert again["average/loss"] == whole["average/loss"]


@pytest.mark.parametrize(
    ("average", "said"),
    [
        ("{kind: ema, horizon: {samples: 0}}", "average.horizon.samples"),
        ("{kind: ema, horizon: {samples: 5, epochs: 1}}", "average.horizon"),
        ("{kind: tail, fraction: 1.5}", "average.fraction"),
        ("{kind: swa}", "average"),
    ],
)
def test_what_is_no_average_is_refused_by_its_key(average: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(apply({"budget": {"epochs": 4}}, f"average={average}"))


def test_fit_says_what_an_average_is() -> None:
    with pytest.raises(ConfigError, match=r"average=.*ema\(epochs=1"):
        fit(network(), loss, data(), growth=exponential(4), budget=budget(samples=8), average="ema")  # pyright: ignore[reportArgumentType]
