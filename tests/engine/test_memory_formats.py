"""How parameters lie in memory does not matter to any optimizer: slices, channels_last, and a change of format."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgrow import CLARS, LAMB, LARS, SGD, Adadelta, Adagrad, AdamW, Muon, NAdam, RMSprop
from distgrow.core.plan import Plan
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.optim import OptimizerSpec

OPTIMIZERS: list[OptimizerSpec] = [
    SGD(momentum=0), SGD(momentum=0.9, weight_decay=0.1), AdamW(weight_decay=0.1), NAdam(), RMSprop(), Adagrad(),
    Adadelta(), Muon(), LAMB(weight_decay=0.1), LAMB(exclude=[]), CLARS(weight_decay=0.1), CLARS(momentum=0),
    LARS(weight_decay=0.1), LARS(momentum=0),
]  # fmt: skip


class Net(nn.Module):
    """A convolution and a matrix whose weights may be slices of larger tensors, and a vector."""

    def __init__(self, *, sliced: bool) -> None:
        super().__init__()
        kernels, matrix, vector = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()
                                   for shape in [(4, 6, 3, 3), (6, 8), (16,)])  # fmt: skip
        parts = [kernels[:, ::2], matrix[:3, :4], vector[::4]]
        self.kernels, self.matrix, self.vector = (nn.Parameter(p if sliced else p.contiguous()) for p in parts)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.conv2d(x, self.kernels).tanh().mean((2, 3)) * self.vector
        return pooled @ self.matrix.T


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(1).mean() + model(batch).sum(1).mean()


def trained(engine: TorchEngine, updates: range) -> None:
    plan = Plan(batch=4, world=1, micro=2, accum=2, lr=0.05, stage=0, window=20)
    for k in updates:
        rows = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(k)).double()
        engine.update(plan, rows.split(2))


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().contiguous() for parameter in model.parameters()]


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=repr)
def test_slices_are_trained_as_tensors_of_their_own_are(spec: OptimizerSpec) -> None:
    models = [Net(sliced=sliced) for sliced in (True, False)]
    for model in models:
        trained(TorchEngine(model, loss, optimizer=spec), range(4))
    torch.testing.assert_close(parameters(models[0]), parameters(models[1]), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("spec", "delay"), [(spec, delay) for spec in OPTIMIZERS for delay in (0, 2) if not (delay and spec.goes_by_parts)]
)
def test_a_run_goes_on_in_another_memory_format(spec: OptimizerSpec, delay: int, tmp_path: Path) -> None:
    models: list[Any] = [Net(sliced=False) for _ in range(3)]
    models[2].to(memory_format=torch.channels_last)
    first, *others = (TorchEngine(model, loss, optimizer=spec, spec=Torch(delay=delay)) for model in models)
    trained(first, range(3))
    for name, data in first.snapshot().items():
        (tmp_path / name).write_bytes(data)
    for engine in others:
        engine.load(tmp_path)
        trained(engine, range(3, 7))
    assert models[1].kernels.stride() != models[2].kernels.stride()
    torch.testing.assert_close(parameters(models[1]), parameters(models[2]), rtol=1e-10, atol=1e-13)
