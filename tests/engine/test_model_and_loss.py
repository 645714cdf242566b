"""Models and losses of every make: parameters of a loss, complex and sparse ones, state of its own, checkpointing."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan, split
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.optim.sgd import SGD

DOUBLE = Torch(precision="float64")


def plan(batch: int = 12, max_micro: int = 5) -> Plan:
    micro, accum = split(batch, 1, max_micro)
    return Plan(batch=batch, world=1, micro=micro, accum=accum, lr=0.1, stage=0)


def rows(update: Plan, wide: int = 6) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(update.batch, wide, generator=draw), torch.randint(0, 2, (update.batch,), generator=draw)
    return [(x[part.start : part.stop], y[part.start : part.stop]) for part in update.rows(0, 0)]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Centres(nn.Module):
    """A criterion with parameters and a buffer of its own."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(8.0).reshape(2, 4) / 8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if self.training:
            self.seen.add_(len(batch[0]))
        return F.cross_entropy(F.linear(model(batch[0]), self.weight), batch[1])


def body() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def test_a_loss_with_parameters_is_trained_as_one_with_the_model_saved_and_resumed(tmp_path: Path) -> None:
    model, centres, update = body(), Centres(), plan()
    by_hand = copy.deepcopy((model, centres)), SGD(momentum=0.9, weight_decay=0.1)
    (their_model, their_centres), spec = by_hand
    parameters = [*their_model.parameters(), *their_centres.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    engine = TorchEngine(model, centres, optimizer=spec)
    whole = tuple(torch.cat(column) for column in zip(*rows(update), strict=True))
    for _ in range(2):
        engine.update(update, rows(update))
        optimizer.zero_grad()
        their_centres(their_model, whole).backward()
        optimizer.step()
    torch.testing.assert_close(centres.weight, their_centres.weight)
    assert centres.seen == 24
    for name, data in engine.snapshot().items():
        (tmp_path / name).write_bytes(data)
    again_model, again_centres = body(), Centres()
    again = TorchEngine(again_model, again_centres, optimizer=spec)
    again.load(tmp_path)
    assert torch.equal(again_centres.weight, centres.weight)
    assert again_centres.seen == 24
    for one in (engine, again):
        one.update(update, rows(update))
    assert torch.equal(again_centres.weight, centres.weight)


def test_exact_gradients_include_the_parameters_of_the_loss() -> None:
    model, centres, update = body(), Centres(), plan()
    engine = TorchEngine(model, centres, spec=DOUBLE, optimizer=SGD(weight_decay=0.1))
    (batch, *_), objective = rows(update, 6), engine.functional()
    x, y = batch[0].double(), batch[1]
    parameters = [*model.parameters(), *centres.parameters()]
    expected = torch.autograd.grad(centres(model, (x, y)), parameters)
    gradient = objective.gradient(batch)[1]
    for one, other, parameter in zip(gradient, expected, parameters, strict=True):
        torch.testing.assert_close(one, other + 0.1 * parameter.detach())


def test_parameters_that_a_loss_hides_are_refused() -> None:
    hidden = nn.Linear(4, 2)
    engine, update = TorchEngine(body(), lambda model, batch: loss(nn.Sequential(model, hidden), batch)), plan()
    with pytest.raises(ConfigError, match=r"2 trainable parameters, of shape \(2,?\)?.*would not be trained"):
        engine.update(update, rows(update))


class Saved(nn.Module):
    """A model that computes a block's forward again in backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_exact_derivatives_of_a_checkpointed_model_are_those_of_the_plain_one(reentrant: bool) -> None:
    plain, saved = (TorchEngine(Saved(how), loss, spec=DOUBLE).functional() for how in (None, reentrant))
    batch = rows(plan())[0]
    gradient = plain.gradient(batch)[1]
    torch.testing.assert_close(saved.gradient(batch)[1], gradient)
    assert all(parameter.grad is None for parameter in saved.parameters)
    if reentrant:
        with pytest.raises(ConfigError, match="curvature"):
            saved.product(batch, gradient)
    else:
        torch.testing.assert_close(saved.product(batch, gradient), plain.product(batch, gradient))


class Spectral(nn.Module):
    """A complex filter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.out = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6))


class Pairs(Spectral):
    """The same, its complex numbers held as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_real(self.weight.detach()).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.weight), n=6))


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_complex_parameters_train_as_pairs_of_real_ones(precision: Any) -> None:
    update, engines = plan(), []
    for model in (Spectral(), Pairs()):
        optimizer = SGD(momentum=0.9, weight_decay=0.1, clip=0.5)
        engines.append(TorchEngine(model, loss, spec=Torch(precision=precision), optimizer=optimizer))
        outcomes = [engines[-1].update(update, rows(update)) for _ in range(3)]
        assert all(outcome.applied for outcome in outcomes)
    one, other = (engine.model.weight for engine in engines)
    assert one.dtype == {"float32": torch.complex64, "float64": torch.complex128}[precision]
    torch.testing.assert_close(torch.view_as_real(one), other)


def test_embeddings_with_sparse_gradients_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="bag is EmbeddingBag.*sparse=False"):
        TorchEngine(nn.ModuleDict({"bag": nn.EmbeddingBag(5, 2, sparse=True)}), loss)
    table = nn.Parameter(torch.randn(5, 2))
    model = nn.Module()
    model.register_parameter("table", table)
    engine = TorchEngine(model, lambda model, ids: F.embedding(ids, table, sparse=True).square().mean())
    with pytest.raises(ConfigError, match="table is sparse.*sparse=False"):
        engine.update(plan(), [torch.zeros(len(part), 3, dtype=torch.long) for part in plan().rows(0, 0)])


@pytest.mark.parametrize(
    ("extra", "said"), [(np.float64(1.0), "numpy"), (lambda: 1, "cannot be written"), ({"scale": [1.0, "text"]}, None)]
)
def test_state_that_could_not_be_read_back_is_refused_when_it_is_written(extra: Any, said: str | None) -> None:
    class Own(nn.Linear):
        def get_extra_state(self) -> Any:
            return extra

        def set_extra_state(self, state: Any) -> None:
            assert state == extra

    engine = TorchEngine(Own(6, 2), loss)
    if said is None:
        assert engine.snapshot()
    else:
        with pytest.raises(ConfigError, match=f"{said}.*get_extra_state"):
            engine.snapshot()


class Late(nn.Module):
    """A layer that takes part in the loss of some updates only."""

    used = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.late, self.last = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.late(x) if self.used else x)


def test_a_parameter_whose_first_gradient_comes_late_steps_as_by_hand() -> None:
    ours, theirs, update = Late(), Late(), plan(12, 12)
    engine = TorchEngine(ours, loss, optimizer=SGD(momentum=0.9, weight_decay=0.1))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
    for used in (False, True, False, True):
        ours.used = theirs.used = used
        engine.update(update, rows(update))
        optimizer.zero_grad()
        loss(theirs, rows(update)[0]).backward()
        optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)
