"""Noise of each parameter: by hand, against the noise of all, after a resume, and in the report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import data, loss, network
from torch import Tensor, nn

from distgrow import SGD, RunSpec, Torch, budget, constant_lr, every, exponential, fit
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.errors import ConfigError
from distgrow.core.noise_stats import Measuring
from distgrow.core.plan import Plan
from distgrow.engine.spec import DeepSpeed, EngineSpec
from distgrow.engine.torch import TorchEngine
from distgrow.optim import OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.clars import CLARS
from distgrow.report.runs import read
from distgrow.report.sections import parameter_table
from distgrow.training.spec import Evaluation

Parts = list[tuple[Tensor, Tensor]]


def parts_of(sizes: list[int]) -> Parts:
    rows, parts, start = data(), Parts(), 0
    for size in sizes:
        chosen = rows[start : start + size]
        parts.append((torch.stack([row for row, _ in chosen]), torch.tensor([label for _, label in chosen])))
        start += size
    return parts


def by_hand(model: Any, parts: Parts) -> dict[str, tuple[float, float]]:
    """Return |G|² and tr Σ of each parameter, from gradients of the parts that autograd gives."""
    batch, found = sum(len(y) for _, y in parts), dict[str, tuple[float, float]]()
    for name, parameter in model.named_parameters():
        gradients = [torch.autograd.grad(loss(model, part), parameter)[0] for part in parts]
        whole = sum((len(y) * g for (_, y), g in zip(parts, gradients, strict=True)), torch.zeros(())) / batch
        spread = sum(
            len(y) * float((g - whole).square().sum()) for (_, y), g in zip(parts, gradients, strict=True)
        )  # Σ n_i|g_i − g|²
        trace = spread / (len(parts) - 1)
        found[name] = (float(whole.square().sum()) - trace / batch, trace)
    return found


@pytest.mark.parametrize("spec", [SGD(clip=0.01), AdamW(), CLARS(), SGD(weight_decay=0.5)], ids=lambda spec: spec.kind)
def test_the_figures_are_those_of_gradients_taken_by_hand(spec: OptimizerSpec) -> None:
    """The sum of squares about the mean over parts − 1 is unbiased for parts of any sizes, here 5, 5 and 4."""
    model, parts = network(), parts_of([4, 5, 5])
    expected = by_hand(model, parts)
    engine = TorchEngine(model, loss, spec=Torch(precision="float64"), optimizer=spec)
    plan = Plan(batch=14, world=1, micro=5, accum=3, lr=0.1, stage=0, window=20, by_parameter=True)
    engine.update(plan, parts)
    found = engine.parameter_noise()
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair, rel=1e-6), name  # clipping divides by norm + 1e-6


class Unlike(nn.Module):
    """Parameters of unlike precision, one complex, one without dimensions; the wider ones come last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow = nn.Parameter(torch.randn(4).bfloat16())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.narrow.float() * self.scale + (x * self.phase).abs() + x * self.wide.float()).sum(1)


@pytest.mark.parametrize("spec", [SGD(), CLARS(exclude=[])], ids=lambda spec: spec.kind)
def test_parameters_may_be_of_any_type(spec: OptimizerSpec) -> None:
    def squares(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    model, parts = Unlike(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).split(1)
    names = [name for name, _ in model.named_parameters()]
    each = [torch.autograd.grad(squares(model, part), list(model.parameters())) for part in parts]
    engine = TorchEngine(model, squares, optimizer=spec)
    plan = Plan(batch=8, world=1, micro=1, accum=8, lr=0.0, stage=0, window=20, by_parameter=True)
    engine.update(plan, parts)
    found = engine.parameter_noise()
    for k, name in enumerate(names):
        rows = torch.stack([gradients[k] for gradients in each])
        wide = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
        trace = float((wide - wide.mean(0)).abs().square().sum()) / 7
        square = float(wide.mean(0).abs().square().sum()) - trace / 8
        close = 0.1 if name == "narrow" else 1e-4  # its gradients are added up in half precision
        assert found[name] == pytest.approx((square, trace), rel=close, abs=close * trace), name
        if isinstance(spec, CLARS):
            state = engine.optimizer.state[model.get_parameter(name)]
            assert float(state["square_sum"]) / 8 == pytest.approx(square + trace, rel=close)


@pytest.mark.parametrize("spec", [SGD(), CLARS()], ids=lambda spec: spec.kind)
def test_frozen_parameters_are_not_among_them(spec: OptimizerSpec) -> None:
    model, parts = network(), parts_of([4, 5, 5])
    first, *others = model.named_parameters()
    first[1].requires_grad_(False)
    engine = TorchEngine(model, loss, spec=Torch(precision="float64"), optimizer=spec)
    plan = Plan(batch=14, world=1, micro=5, accum=3, lr=0.1, stage=0, window=20, by_parameter=True)
    engine.update(plan, parts)
    assert list(engine.parameter_noise()) == [name for name, _ in others]


def run(
    folder: Path, *, engine: EngineSpec | None = None, resume: bool = False, by_parameter: bool = True
) -> list[dict[str, Any]]:
    """Train, and return the lines of noise by parameter."""
    kept = {"eval": Evaluation(every_steps=5), "checkpoint": Checkpointing(every_steps=4, keep=99)}
    noise = Measuring(by_parameter=by_parameter, every=1)
    fit(
        network(), loss, data(), test=data(8), growth=exponential(8, 2, 32), stages=every(samples=160),
        budget=budget(samples=480), lr=constant_lr(0.05), optimizer=SGD(momentum=0.9), resume=resume,
        run=RunSpec(dir=str(folder), noise=noise, **kept), engine=engine or Torch(precision="float64", max_micro=4),
    )  # fmt: skip
    return lines(folder, "parameter_noise")


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == kind]


def test_the_parameters_sum_to_the_noise_of_all_at_every_evaluation(tmp_path: Path) -> None:
    logged = run(tmp_path)
    steps = {line["step"]: line for line in lines(tmp_path, "step")}
    assert [line["step"] for line in logged] == [line["step"] for line in lines(tmp_path, "eval")]
    assert len(logged) > 4
    for line in logged:
        of_all = steps[line["step"]]
        assert sum(line["noise_trace"]) == pytest.approx(of_all["noise_trace"], rel=1e-9)
        assert sum(line["grad_sq"]) == pytest.approx(of_all["grad_sq"], rel=1e-6, abs=1e-12)
    table = parameter_table(read([str(tmp_path)])[0])
    assert table is not None
    assert [row[0] for row in table.rows] == [name for name, _ in network().named_parameters()]


def test_measuring_it_moves_nothing_and_a_resumed_run_ends_with_the_same_figures(tmp_path: Path) -> None:
    whole = run(tmp_path / "run")
    assert run(tmp_path / "plain", by_parameter=False) == []
    steps = [lines(tmp_path / name, "step") for name in ("run", "plain")]
    assert [line["loss"] for line in steps[0]] == [line["loss"] for line in steps[1]]
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for checkpoint in kept[len(kept) // 2 :]:
        shutil.rmtree(checkpoint)  # as if it had been killed
    resumed = run(tmp_path / "run", resume=True)
    assert len(resumed) > len(whole)
    keys = ("names", "grad_sq", "noise_trace", "step", "samples")
    assert [resumed[-1][key] for key in keys] == [whole[-1][key] for key in keys]


def test_sharded_parameters_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.noise\.by_parameter=true .*kind=deepspeed .*kind=torch"):
        run(tmp_path, engine=DeepSpeed(max_micro=4))
