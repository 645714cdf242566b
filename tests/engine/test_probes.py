"""Exact probes against closed forms, and that they leave no trace."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.data.datasets import Arrays
from distgrow.data.stream import evaluation_batches, random_parts
from distgrow.distributed.world import World
from distgrow.engine.probes import Probe
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.optim import Optimizer
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.tasks.models import GPT

ROWS, FEATURES, CLASSES = 45, 6, 4


def data(rows: int = ROWS) -> Arrays:
    """A classification problem in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
    return Arrays(inputs, torch.randint(CLASSES, (rows,), generator=generator))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def softmax() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, CLASSES, bias=False).double()


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(9)] if norm else []
    return nn.Sequential(nn.Linear(FEATURES, 9), *middle, nn.Dropout(0.5), nn.Tanh(), nn.Linear(9, CLASSES)).double()


def engine(model: nn.Module, optimizer: Optimizer | None = None, loss: Any = loss) -> TorchEngine:
    return TorchEngine(model, loss, spec=Torch(precision="float64"), optimizer=optimizer)


def probe(engine: TorchEngine, data: Arrays, rows: int = 8) -> Probe:
    return Probe(engine, World(), lambda: evaluation_batches(data, World(), rows))


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("rows", [1, 8, 45, 100])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_full_gradient_of_softmax_regression_is_its_closed_form(rows: int, decay: float) -> None:
    model, samples = softmax(), data()
    weight = next(model.parameters()).detach()
    excess = torch.softmax(samples.inputs @ weight.T, 1) - F.one_hot(samples.labels, CLASSES)
    wanted = excess.T @ samples.inputs / ROWS + decay * weight
    found = probe(engine(model, SGD(weight_decay=decay)), samples, rows)
    value, gradient = found.gradient()
    torch.testing.assert_close(gradient[0], wanted, rtol=1e-12, atol=1e-14)
    assert found.norm(gradient) == pytest.approx(float(wanted.norm()), rel=1e-12)
    assert value == pytest.approx(loss(model, (samples.inputs, samples.labels)).item(), rel=1e-12)


def test_decoupled_weight_decay_is_no_part_of_the_objective() -> None:
    decayed, plain = (probe(engine(softmax(), AdamW(weight_decay=decay)), data()).gradient() for decay in (0.5, 0.0))
    assert torch.equal(decayed[1][0], plain[1][0])


def test_every_sample_counts_once_and_is_counted_once() -> None:
    machine = engine(network())
    found = probe(machine, data())
    found.gradient()
    assert (machine.evaluations, found.passes) == (ROWS, 1)
    found.gradient()
    assert (machine.evaluations, found.passes) == (2 * ROWS, 2)


@pytest.mark.parametrize(
    "measure",
    [
        lambda found: found.gradient(),
        lambda found: found.smoothness(tolerance=0.1, most=3, seed=0),
        lambda found: found.noise(found.gradient()[1], ROWS, pairs(data(), 9, 0)),
    ],
)
def test_a_probe_leaves_no_trace(measure: Callable[[Probe], Any]) -> None:
    model, samples = network(norm=True), data()
    machine = engine(model, SGD(momentum=0.9, weight_decay=0.01))
    plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0, seed=5)
    machine.update(plan, [(samples.inputs[:8], samples.labels[:8])])
    parameters = list(model.parameters())
    before = copy.deepcopy((model.state_dict(), machine.optimizer.state_dict()))
    random, numbers = torch.get_rng_state(), [parameter.data_ptr() for parameter in parameters]
    measure(probe(machine, samples))
    after = (model.state_dict(), machine.optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=0)
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)
    assert [parameter.data_ptr() for parameter in parameters] == numbers
    assert all(module.training for module in model.modules())


def test_batch_norm_and_dropout_are_in_eval_mode() -> None:
    model, samples = network(norm=True), data()
    _, gradient = probe(engine(model), samples).gradient()
    model.eval()
    wanted = torch.autograd.grad(loss(model, (samples.inputs, samples.labels)), list(model.parameters()))
    torch.testing.assert_close(flat(gradient), flat(wanted), rtol=1e-10, atol=1e-13)


def test_half_precision_training_is_probed_in_single_precision() -> None:
    samples = Arrays(data().inputs.float(), data().labels)
    half, single = (
        probe(TorchEngine(network().float(), loss, spec=Torch(precision=precision)), samples).gradient()
        for precision in ("bfloat16", "float32")
    )
    assert torch.equal(flat(half[1]), flat(single[1]))


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].weight.requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    _, gradient = probe(engine(model), data()).gradient()
    assert [g.shape for g in gradient] == [p.shape for p in model.parameters() if p.requires_grad]


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason() -> None:
    class Stuck(nn.Linear):
        def __deepcopy__(self, memo: Any) -> "Stuck":
            raise TypeError("it holds a lock")

    stuck = engine(Stuck(FEATURES, CLASSES).double())
    with pytest.raises(ConfigError, match="cannot be copied.*it holds a lock"):
        probe(stuck, data()).gradient()


# ── curvature and noise ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Truth:
    """What brute force says of a model: all second derivatives, and every sample's gradient."""

    hessian: torch.Tensor
    gradients: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return self.gradients.mean(0)

    @property
    def covariance(self) -> torch.Tensor:
        apart = self.gradients - self.mean
        return apart.T @ apart / len(apart)


def truth(model: nn.Module, samples: Arrays, decay: float = 0.0) -> Truth:
    model = copy.deepcopy(model).eval()
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)

    def value(theta: torch.Tensor, rows: slice) -> torch.Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        tensors = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(model, tensors, (samples.inputs[rows],))
        return F.cross_entropy(outputs, samples.labels[rows]) + decay / 2 * theta.square().sum()

    theta = flat(model.parameters())
    everything = slice(0, len(samples))
    gradients = [torch.func.grad(value)(theta, slice(k, k + 1)) for k in range(len(samples))]
    return Truth(torch.func.hessian(value)(theta, everything), torch.stack(gradients))


def pairs(samples: Arrays, parts: int, seed: int) -> Any:
    return zip(*(random_parts(samples, World(), parts, 2 * seed + k) for k in range(2)), strict=True)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("make", [softmax, network, lambda: network(norm=True)])
def test_products_and_smoothness_are_those_of_the_whole_hessian(make: Callable[[], nn.Module], decay: float) -> None:
    model, samples = make(), data()
    exact, found = truth(model, samples, decay), probe(engine(model, SGD(weight_decay=decay)), samples, 7)
    _, gradient = found.gradient()
    torch.testing.assert_close(flat(gradient), exact.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(found.product(gradient)), exact.hessian @ exact.mean, rtol=1e-9, atol=1e-12)
    along = exact.mean @ exact.hessian @ exact.mean / exact.mean.square().sum()
    assert found.curvature(gradient) == pytest.approx(float(along), rel=1e-9)
    largest = float(torch.linalg.eigvalsh(exact.hessian).abs().max())
    assert found.smoothness(tolerance=1e-12, most=2000, seed=0)[0] == pytest.approx(largest, rel=1e-5)
    rough, products = found.smoothness(tolerance=0.01, most=100, seed=0)
    assert 0.8 * largest <= rough <= largest * (1 + 1e-12)
    assert products < 30


def test_the_hessian_of_softmax_regression_is_its_closed_form() -> None:
    model, samples = softmax(), data()
    chance = torch.softmax(samples.inputs @ next(model.parameters()).detach().T, 1)
    outer = torch.diag_embed(chance) - chance[:, :, None] * chance[:, None, :]
    hessian = torch.einsum("nab,ni,nj->aibj", outer, samples.inputs, samples.inputs) / ROWS
    vector = torch.randn(CLASSES, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = torch.einsum("aibj,bj->ai", hessian, vector)
    torch.testing.assert_close(probe(engine(model), samples).product([vector])[0], wanted, rtol=1e-11, atol=1e-13)


def test_a_quadratics_largest_eigenvalue_is_found_where_it_is_negative_and_a_linear_loss_has_none() -> None:
    bend = torch.diag(torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64))

    def quadratic(model: nn.Module, batch: Any) -> torch.Tensor:
        theta = next(model.parameters()).squeeze(0)
        return theta @ bend @ theta / 2 + (batch[0][:, :3] @ theta).mean()

    model = nn.Linear(3, 1, bias=False).double()
    machine = engine(model, loss=quadratic)
    assert probe(machine, data()).smoothness(tolerance=1e-12, most=500, seed=1)[0] == pytest.approx(3.0, rel=1e-6)
    linear = engine(model, loss=lambda model, batch: model(batch[0][:, :3]).mean())
    assert probe(linear, data()).smoothness(tolerance=0.01, most=50, seed=1) == (0.0, 1)


def test_the_noise_of_single_samples_has_the_exact_trace() -> None:
    model, samples = network(), data()
    exact, found = truth(model, samples), probe(engine(model), samples)
    noise = found.noise(found.gradient()[1], ROWS, pairs(samples, ROWS, 0))
    assert noise.trace.value == pytest.approx(float(exact.covariance.trace()), rel=1e-9)
    assert noise.trace.error == 0
    assert noise.curved.error > 0


@pytest.mark.parametrize("parts", [10, ROWS])
def test_noise_from_random_parts_is_unbiased_and_its_errors_are_honest(parts: int) -> None:
    model, samples = network(), data()
    exact, found = truth(model, samples, 0.1), probe(engine(model, SGD(weight_decay=0.1)), samples)
    gradient = found.gradient()[1]
    noises = [found.noise(gradient, ROWS, pairs(samples, parts, seed)) for seed in range(300 // parts)]
    for wanted, estimates in [
        (float(exact.covariance.trace()), [noise.trace for noise in noises]),
        (float((exact.hessian @ exact.covariance).trace()), [noise.curved for noise in noises]),
    ]:
        values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
        spread = float(values.std())
        assert float(values.mean()) == pytest.approx(wanted, abs=4 * spread / len(values) ** 0.5 + 1e-9)
        told = sum(estimate.error**2 for estimate in estimates) ** 0.5 / len(estimates) ** 0.5
        assert spread < 1.5 * told + 1e-9


def test_a_pass_of_noise_costs_three_evaluations_a_sample_and_a_product_two() -> None:
    machine = engine(network())
    found = probe(machine, data())
    gradient = found.gradient()[1]
    found.noise(gradient, ROWS, pairs(data(), 10, 0))
    assert (machine.evaluations, found.passes) == (4 * ROWS, 4)
    found.curvature(gradient)
    assert (machine.evaluations, found.passes) == (6 * ROWS, 6)
    _, products = found.smoothness(tolerance=0.1, most=3, seed=0)
    assert (machine.evaluations, found.passes) == ((6 + 2 * products) * ROWS, 6 + 2 * products)


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    model = GPT(11, 5, layers=1, width=8, heads=2, dropout=0.1)
    tokens = torch.randint(11, (12, 6), generator=torch.Generator().manual_seed(0))

    def next_token(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    found = probe(TorchEngine(model, next_token), Arrays(tokens[:, :-1], tokens[:, 1:]), 5)
    _, gradient = found.gradient()
    nearby = copy.deepcopy(model)
    step = 1e-2 / found.norm(gradient)
    with torch.no_grad():
        for parameter, part in zip(nearby.parameters(), gradient, strict=True):
            parameter.add_(step * part)
    _, moved = probe(TorchEngine(nearby, next_token), Arrays(tokens[:, :-1], tokens[:, 1:]), 5).gradient()
    bent = (flat(moved) - flat(gradient)) / step
    assert (flat(found.product(gradient)) - bent).norm() < 0.05 * bent.norm()


def test_a_model_without_second_derivatives_is_refused_with_the_way_out() -> None:
    def attending(model: nn.Module, batch: Any) -> torch.Tensor:
        rows = model(batch[0])[None, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, rows, rows)[0].square().mean()

    machine = engine(softmax(), loss=attending)
    found = probe(machine, data())
    with pytest.raises(ConfigError, match="run.probe.curvature=true needs second derivatives"):
        found.product(found.gradient()[1])


def test_a_model_that_is_compiled_for_training_is_probed_uncompiled() -> None:
    compiled = TorchEngine(network(), loss, spec=Torch(precision="float64", compile=True))
    found, plain = probe(compiled, data()), probe(engine(network()), data())
    gradient = found.gradient()[1]
    assert torch.equal(flat(gradient), flat(plain.gradient()[1]))
    assert torch.equal(flat(found.product(gradient)), flat(plain.product(gradient)))
