"""LARS, LAMB, CLARS and Muon: their rules by hand, what they leave alone, and what they do not depend on."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgrow import CLARS, LAMB, LARS, AdamW, Muon, ParameterGroup, Parameters
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.engine.torch import TorchEngine
from distgrow.optim import OptimizerSpec
from distgrow.optim.layerwise import Layerwise

NOBODY: list[Parameters] = []


class Vector(nn.Module):
    """f(w; x) = ⟨x, w⟩, whose gradient for a sample is x."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def linear(model: nn.Module, batch: Tensor) -> Tensor:
    return (batch * model.get_parameter("w")).sum(1).mean()


def moved(spec: OptimizerSpec, samples: Sequence[Sequence[float]], *, lr: float, start: Sequence[float]) -> list[float]:
    """Return how far one update of single-row micro-batches moves w."""
    model, rows = Vector(start), torch.tensor(samples, dtype=torch.float64)
    engine = TorchEngine(model, linear, optimizer=spec)
    count = len(rows)
    plan = Plan(batch=count, world=1, micro=1, accum=count, lr=lr, stage=0, window=20 if count > 1 else 0)
    engine.update(plan, rows.split(1))
    return (model.w.detach() - torch.tensor(start)).tolist()


@pytest.mark.parametrize(
    ("spec", "samples", "lr", "step"),
    [
        (LARS(exclude=NOBODY), [(1, 0)], 10, (-0.05, 0)),
        (LARS(exclude=NOBODY, weight_decay=0.1, eps=0), [(1, 0)], 10, (-0.0433333, -0.0133333)),
        (CLARS(exclude=NOBODY), [(3, 0), (-1, 0)], 1, (-0.0223607, 0)),
        (LAMB(exclude=NOBODY, eps=1e-300), [(1, 0)], 0.01, (-0.0499623, -0.0019403)),
    ],
    ids=["lars", "lars, decay", "clars", "lamb"],
)  # fmt: skip
def test_first_steps_are_those_computed_by_hand(spec: OptimizerSpec, samples: Any, lr: float, step: Any) -> None:
    """w = (3, 4). LAMB's second number has the sign of the decay alone."""
    found = moved(spec, samples, lr=lr, start=(3, 4))
    assert found == pytest.approx(step, rel=2e-5, abs=1e-9)


@pytest.mark.parametrize("samples", [[(5.0, -2.0)], [(1e-3, 0.0)], [(100.0, 3.0), (7.0, 7.0)]])
def test_a_step_of_lars_has_the_length_of_rate_times_trust_times_parameter(samples: Any) -> None:
    step = moved(LARS(exclude=NOBODY, momentum=0, trust=0.02, eps=0), samples, lr=3, start=(3, 4))
    assert math.hypot(*step) == pytest.approx(3 * 0.02 * 5, rel=1e-12)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(count: int = 5, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    numbers = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 3, generator=numbers, dtype=torch.float64), torch.arange(rows) % 2) for _ in range(count)
    ]


def trained(
    spec: OptimizerSpec, loss: Callable[..., Tensor] = cross_entropy, *, model: nn.Module | None = None, micro: int = 4
) -> list[Tensor]:
    model = model or network()
    engine = TorchEngine(model, loss, optimizer=spec)
    for x, y in batches():
        plan = Plan(batch=8, world=1, micro=micro, accum=8 // micro, lr=0.1, stage=0, window=20 if micro < 8 else 0)
        engine.update(plan, list(zip(x.split(micro), y.split(micro), strict=True)))
    return [parameter.detach().clone() for parameter in model.parameters()]


def by_torch(make: Callable[[Any], torch.optim.Optimizer], model: nn.Module | None = None) -> list[Tensor]:
    model = model or network()
    optimizer = make(model)
    for x, y in batches():
        optimizer.zero_grad()
        (cross_entropy(model, (x[:4], y[:4])) / 2).backward()
        (cross_entropy(model, (x[4:], y[4:])) / 2).backward()
        optimizer.step()
    return list(model.parameters())


ALL = [Parameters(match="")]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", [LARS, CLARS])
def test_without_trust_ratios_steps_are_those_of_sgd_without_decay(kind: type[LARS | CLARS], momentum: float) -> None:
    found = trained(kind(exclude=ALL, weight_decay=0.1, momentum=momentum))
    own = by_torch(lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, fused=True))
    assert all(torch.equal(one, other) for one, other in zip(found, own, strict=True))


def test_without_trust_ratios_steps_of_lamb_are_those_of_adam_without_decay() -> None:
    found = trained(LAMB(exclude=ALL, clip=None))
    own = by_torch(lambda model: torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-6))
    for one, other in zip(found, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "spec",
    [LARS(eps=0), CLARS(eps=0, max_ratio=None), LAMB(eps=1e-300, clip=None, weight_decay=0.3)],
    ids=lambda spec: spec.name,
)
def test_the_scale_of_the_loss_does_not_matter_where_trust_ratios_act(spec: Layerwise) -> None:
    spec, models = spec.model_copy(update={"exclude": NOBODY}), (network(), network())
    for model in models:
        nn.init.constant_(model.get_parameter("2.bias"), 0.3)  # of zeros the trust ratio is 1
    steep = trained(spec, lambda model, batch: 1024 * cross_entropy(model, batch), model=models[0])
    for one, other in zip(trained(spec, model=models[1]), steep, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", [LARS(), LAMB()], ids=lambda spec: spec.name)
def test_micro_batches_do_not_matter(spec: OptimizerSpec) -> None:
    for micro in (1, 2, 8):
        for one, other in zip(trained(spec), trained(spec, micro=micro), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_a_bias_of_zeros_with_a_trust_ratio_moves() -> None:
    for spec in (LARS(exclude=NOBODY), CLARS(exclude=NOBODY, max_ratio=None), LAMB(exclude=NOBODY, weight_decay=0)):
        assert abs(moved(spec, [(1, 0)], lr=0.5, start=(0, 0))[0]) == pytest.approx(0.5, rel=1e-5)


def test_clars_is_lars_where_all_samples_have_one_gradient() -> None:
    samples, settings = [(2.0, -1.0)] * 4, {"trust": 0.004, "momentum": 0, "eps": 0, "exclude": NOBODY}
    one, other = (moved(kind(**settings), samples, lr=2, start=(3, 4)) for kind in (LARS, CLARS))
    assert one == pytest.approx(other, rel=1e-12)


def own_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    found = []
    for k in range(len(x)):
        loss = cross_entropy(model, (x[k : k + 1], y[k : k + 1]))
        found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    return found


@pytest.mark.parametrize("clip", [None, 0.05])
def test_clars_goes_by_the_root_mean_square_of_single_samples_gradients(clip: float | None) -> None:
    """Parts of one row show it exactly; clipping shortens the step, but not what it is measured by."""
    model, (x, y) = network(), batches(1)[0]
    gradients = own_gradients(model, x, y)
    spec = CLARS(exclude=NOBODY, momentum=0, eps=0, clip=clip, max_ratio=None)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    whole = [torch.stack(each).mean(0) for each in zip(*gradients, strict=True)]
    norm = math.sqrt(sum(float(g.square().sum()) for g in whole))
    factor = 1.0 if clip is None else clip / (norm + 1e-6)
    TorchEngine(model, cross_entropy, optimizer=spec).update(
        Plan(batch=8, world=1, micro=1, accum=8, lr=0.7, stage=0, window=20),
        list(zip(x.split(1), y.split(1), strict=True)),
    )
    for start, now, each, mean in zip(before, model.parameters(), zip(*gradients, strict=True), whole, strict=True):
        spread = math.sqrt(sum(float(g.square().sum()) for g in each) / 8)
        ratio = 0.01 * float(start.norm()) / spread if start.norm() else 1.0
        torch.testing.assert_close(now.detach(), start - 0.7 * ratio * factor * mean, rtol=1e-9, atol=1e-12)


def test_what_clars_knows_of_a_model_in_half_precision_is_not_rounded_by_a_resume() -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 3).bfloat16()
        return model, CLARS().made(dict(model.named_parameters()), model)

    (model, before), (_, after) = made(), made()
    model(torch.randn(5, 3, dtype=torch.bfloat16)).square().sum().backward()
    norms = {p: torch.tensor(0.123456789 + p.dim()) for p in model.parameters()}
    before.see(norms, batch=7, parts=2, keep=0.9, clipped=1.0)  # pyright: ignore[reportAttributeAccessIssue]
    before.step()
    after.load_state_dict(before.state_dict())
    assert str(after.state_dict()) == str(before.state_dict())
    kept, loaded = ([s["square_sum"] for s in o.state.values()] for o in (before, after))
    assert all(map(torch.equal, kept, loaded)) and loaded[0].dtype == torch.float32


def test_larger_parts_show_clars_the_same_on_average() -> None:
    """Gradients N(G, s²) in 40 dimensions: the mean square of single ones is |G|² + 40 s², whatever the parts."""
    from distgrow.optim import trust_ratio

    numbers = torch.Generator().manual_seed(2)
    for parts, rows in ((2, 8), (4, 4), (4, 16)):
        w = nn.Parameter(torch.ones(40, dtype=torch.float64))
        optimizer = trust_ratio.CLARS([{"params": [w]}], trust=0.01, momentum=0, eps=0)
        for _ in range(400):
            each = 0.3 + 2 * torch.randn(parts, rows, 40, generator=numbers, dtype=torch.float64)
            means = each.mean(1)
            w.grad = means.mean(0)
            square = means.square().sum(1).mean()
            optimizer.see({w: square}, batch=parts * rows, parts=parts, keep=1, clipped=1)
        state = optimizer.state[w]
        assert float(state["square_sum"] / state["square_weight"]) == pytest.approx(40 * (0.09 + 4), rel=0.05)


def test_clars_steps_a_parameter_that_no_part_has_shown_by_its_own_norm_beside_one_that_was_shown() -> None:
    from distgrow.optim import trust_ratio

    shown, new = (nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64)) for _ in range(2))
    optimizer = trust_ratio.CLARS([{"params": [shown, new], "lr": 1.0}], trust=0.1, momentum=0, eps=0)
    shown.grad = torch.full((4,), 0.5, dtype=torch.float64)  # of norm 1
    optimizer.see({shown: torch.tensor(3.0, dtype=torch.float64)}, batch=8, parts=2, keep=1, clipped=1)
    new.grad = torch.full((4,), 1.5, dtype=torch.float64)  # of norm 3
    optimizer.step()
    variance = (3 - 1) * 8 / (2 - 1)
    expected = (2 - 0.1 * 4 / (1 + variance * 7 / 8) ** 0.5 * 0.5, 2 - 0.1 * 4 / 3 * 1.5)
    assert (shown[0].item(), new[0].item()) == pytest.approx(expected, rel=1e-12)


def test_the_pull_of_lars_grows_with_the_root_of_the_batch_and_that_of_clars_does_not() -> None:
    """In noise alone: so a rate ∝ √b and ∝ b keep the noise of a stationary run, which is what `scaling` says."""
    numbers, ratios = torch.Generator().manual_seed(3), {LARS: [], CLARS: []}
    for batch in (16, 256):
        samples = torch.randn(batch, 400, generator=numbers, dtype=torch.float64)
        for kind, found in ratios.items():
            step = torch.tensor(
                moved(kind(exclude=NOBODY, momentum=0, max_ratio=None), samples.tolist(), lr=1, start=[1.0] * 400)
            )
            found.append(float(step.norm() / samples.mean(0).norm()))
    assert ratios[LARS][1] / ratios[LARS][0] == pytest.approx(4, rel=0.05)
    assert ratios[CLARS][1] / ratios[CLARS][0] == pytest.approx(1, rel=0.05)
    assert (LARS.scaling, LAMB.scaling, CLARS.scaling) == ("sqrt", "sqrt", "linear")


@pytest.mark.parametrize("kappa", [1, 2, 10, 100])
def test_lars_descends_on_a_quadratic_up_to_the_largest_rate_of_theory(kappa: float) -> None:
    """ρ = γϑ ≤ 3√3 κ(κ+1)/(κ²+κ+1)^1.5 descends from every w; above it there is a w from which it does not."""
    curvature = torch.tensor([1.0, kappa], dtype=torch.float64)
    most = 3 * math.sqrt(3) * kappa * (kappa + 1) / (kappa**2 + kappa + 1) ** 1.5
    angles = [math.atan(kappa**-power) for power in torch.linspace(0, 3, 61).tolist()]

    def falls(rho: float) -> bool:
        changes = []
        for angle in angles:
            w = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
            step = torch.tensor(
                moved(
                    LARS(exclude=NOBODY, momentum=0, trust=1.0, eps=0),
                    [(curvature * w).tolist()],
                    lr=rho,
                    start=w.tolist(),
                )  # fmt: skip
            )
            changes.append(float((curvature * (w + step).square()).sum() - (curvature * w.square()).sum()))
        return max(changes) < 0

    assert falls(0.99 * most)
    assert not falls(1.02 * most)


class Small(nn.Module):
    """An embedding, a convolution, two matrices with biases, a norm and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 3)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.filter = nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.filter(self.body(self.table(x)).unsqueeze(1)).squeeze(1))


def test_muon_steps_matrices_and_adamw_all_else() -> None:
    x, y = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), torch.arange(8) % 2
    ours, theirs = Small().double(), Small().double()
    spec = Muon(
        exclude=[Parameters(match="head")], adamw_lr_scale=0.5, groups=[ParameterGroup(match="2", lr_scale=0.1)]
    )
    engine = TorchEngine(ours, cross_entropy, optimizer=spec)
    muons = [theirs.body[0].weight, theirs.body[2].weight]
    own = torch.optim.Muon(
        [{"params": muons[:1], "lr": 0.02}, {"params": muons[1:], "lr": 0.002}], adjust_lr_fn="match_rms_adamw"
    )
    mine = {id(p) for p in muons}
    slow = [theirs.body[2].bias]
    rest = [p for p in theirs.parameters() if id(p) not in mine and p is not slow[0]]
    adamw = torch.optim.AdamW(
        [{"params": rest, "lr": 0.01}, {"params": slow, "lr": 0.001}], betas=(0.9, 0.95), weight_decay=0.1
    )
    for _ in range(4):
        engine.update(Plan(batch=8, world=1, micro=8, accum=1, lr=0.02, stage=0), [(x, y)])
        for optimizer in (own, adamw):
            optimizer.zero_grad()
        cross_entropy(theirs, (x, y)).backward()
        for optimizer in (own, adamw):
            optimizer.step()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14, msg=name)


def test_muon_tells_which_parameters_are_whose() -> None:
    spec, model = Muon(exclude=[Parameters(match="head")], adamw_lr_scale=0.5), Small()
    assert spec.shown(dict(model.named_parameters()), model) == [
        "parameters of rest, by Muon: 2, 28 numbers",
        "parameters of rest, by AdamW: 8, 43 numbers, lr_scale 0.5",
    ]


def test_muon_without_a_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer.kind=muon finds no matrix.*use optimizer.kind=adamw"):
        TorchEngine(Vector((1.0, 2.0)), linear, optimizer=Muon())


@pytest.mark.parametrize("kind", [Muon, LARS, LAMB, CLARS])
def test_a_misspelt_name_in_exclude_is_refused_and_a_dimension_that_no_parameter_has_is_not(kind: Any) -> None:
    model = nn.Linear(3, 3)
    named = dict(model.named_parameters())
    kind(exclude=[Parameters(match="bias"), Parameters(ndim=4)]).made(named, model)
    with pytest.raises(ConfigError, match=r"optimizer\.exclude\[1\]: match='haed' meets no parameter.*weight, bias"):
        kind(exclude=[Parameters(ndim=4), Parameters(match="haed")]).made(named, model)


def test_excluded_parameters_are_told_with_their_decay() -> None:
    model = network()
    told = LARS(weight_decay=0.1, groups=[ParameterGroup(match="^0", weight_decay=0.2)]).shown(
        dict(model.named_parameters()), model
    )
    assert told == [
        "parameters of match='^0', without trust ratio: 1, 4 numbers, weight_decay 0.2",
        "parameters of match='^0': 1, 12 numbers, weight_decay 0.2",
        "parameters of rest, without trust ratio: 3, 10 numbers, weight_decay 0",
        "parameters of rest: 1, 8 numbers",
    ]
    assert AdamW().shown(dict(model.named_parameters()), model) == []
