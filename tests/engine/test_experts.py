"""Sparse experts: what is chosen, what gets a gradient, and that no split of a batch changes the loss."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgrow import SGD, Torch
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.engine.torch import TorchEngine
from distgrow.tasks.architectures import GPT, Tokens
from distgrow.tasks.experts import Active, Experts, balance, choice, with_balance
from distgrow.tasks.models import feed_forward

WIDTH, COUNT = 6, 5


def layer(active: int, capacity: float | None = None) -> Experts:
    torch.manual_seed(0)
    return Experts(WIDTH, lambda: feed_forward(WIDTH), count=COUNT, active=Active(active), capacity=capacity).double()


def tokens(rows: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(experts: Experts, x: Tensor, active: int) -> Tensor:
    """Return Σ p_e·E_e(x), token by token."""
    out = torch.zeros_like(x)
    for place in itertools.product(range(x.shape[0]), range(x.shape[1])):
        logits = (experts.router.weight @ x[place]).tolist()
        chosen = sorted(range(COUNT), key=lambda e: -logits[e])[:active]  # Python's sort keeps equal ones in order
        weights = torch.tensor([logits[e] for e in chosen], dtype=torch.float64).softmax(0)
        out[place] = sum(p * experts.experts[e](x[place]) for p, e in zip(weights, chosen, strict=True))
    return out


@pytest.mark.parametrize("active", range(1, COUNT + 1))
def test_the_output_is_the_sum_over_the_chosen_experts_token_by_token(active: int) -> None:
    experts, x = layer(active), tokens()
    with torch.no_grad():
        torch.testing.assert_close(experts(x), by_hand(experts, x, active), rtol=1e-12, atol=1e-14)


def test_all_experts_are_the_dense_soft_mixture() -> None:
    experts, x = layer(COUNT), tokens()
    weights = experts.router(x).softmax(-1)
    mixture = sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(experts.experts))
    torch.testing.assert_close(experts(x), mixture, rtol=1e-12, atol=1e-14)


def test_one_expert_is_the_one_with_the_largest_logit() -> None:
    experts, x = layer(1), tokens()
    best = experts.router(x).argmax(-1)
    each = torch.stack([expert(x) for expert in experts.experts], dim=2)
    wanted = each.gather(2, best[..., None, None].expand(-1, -1, 1, WIDTH)).squeeze(2)
    torch.testing.assert_close(experts(x), wanted, rtol=1e-12, atol=1e-14)


def test_equal_logits_go_to_the_experts_with_the_smallest_numbers() -> None:
    _, chosen = choice(torch.tensor([[1.0, 3.0, 3.0, 3.0, 1.0], [0.0] * 5]).unsqueeze(0), 2)
    assert chosen.tolist() == [[[False, True, True, False, False], [True, True, False, False, False]]]


@pytest.mark.parametrize("active", [1, 3])
def test_experts_that_are_not_chosen_have_a_gradient_and_it_is_exactly_0(active: int) -> None:
    experts, x = layer(active), tokens(rows=1, length=1)
    experts(x).square().sum().backward()
    _, chosen = choice(experts.router(x), active)
    for e, expert in enumerate(experts.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == bool(chosen[0, 0, e])


def test_with_equal_experts_the_output_does_not_depend_on_how_many_are_active() -> None:
    experts, x = layer(1), tokens()
    for expert in experts.experts[1:]:
        expert.load_state_dict(experts.experts[0].state_dict())
    first = experts(x)
    for active in range(2, COUNT + 1):
        experts.active.experts = active
        torch.testing.assert_close(experts(x), first, rtol=1e-12, atol=1e-14)


def test_a_single_expert_is_the_dense_model_to_the_bit() -> None:
    inputs, batch = Tokens(length=8, vocabulary=11), torch.randint(11, (2, 8))
    dense = GPT(layers=2, width=16, heads=2).build(inputs)
    sparse = GPT(layers=2, width=16, heads=2, experts=1, active=1).build(inputs)
    names = {name.replace("feed.", "feed.experts.0."): value for name, value in dense.state_dict().items()}
    missing = sparse.load_state_dict(names, strict=False)
    assert not missing.unexpected_keys
    assert {name.split(".")[-2] for name in missing.missing_keys} == {"router"}
    assert torch.equal(sparse(batch), dense(batch))


def test_without_experts_weights_are_drawn_as_those_of_these_layers_alone() -> None:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Embedding(11, 16), nn.Embedding(8, 16), nn.LayerNorm(16), nn.LayerNorm(16)]
    parts += [nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(16)]
    nn.Linear(16, 11, bias=False)  # the head, tied
    matrices = [parameter for part in parts for parameter in part.parameters() if parameter.dim() == 2]
    scales = [1, 1, 1, 2**-0.5, 1, 2**-0.5]  # those of the two ways back into the residual stream
    for parameter, scale in zip(matrices, scales, strict=True):
        nn.init.normal_(parameter, std=0.02 * scale)
    wanted = [parameter for part in parts for parameter in part.parameters()]
    for spec in (GPT(layers=1, width=16), GPT(layers=1, width=16, experts=0)):
        torch.manual_seed(0)
        built = spec.build(Tokens(length=8, vocabulary=11))
        assert all(torch.equal(ours, by) for ours, by in zip(built.parameters(), wanted, strict=True))


def test_without_experts_the_loss_is_the_loss_and_the_config_that_of_before() -> None:
    model = GPT(width=16).build(Tokens(length=8, vocabulary=11))
    assert with_balance(model, cross_entropy) is cross_entropy
    assert GPT(experts=0) == GPT()  # a run that recorded neither goes on
    assert {"experts", "active", "capacity", "balance"}.isdisjoint(GPT().model_dump(exclude_none=True))


# ── capacity ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_expert_takes_the_first_tokens_of_a_row_and_further_ones_pass_it_by() -> None:
    experts, x = layer(2, capacity=1.0), tokens(rows=2, length=10)
    weights, chosen = choice(experts.router(x), 2)
    wanted, room = torch.zeros_like(x), 4  # 1.0 · 2 · 10 / 5
    for row, e in itertools.product(range(2), range(COUNT)):
        for place in [t for t in range(10) if chosen[row, t, e]][:room]:
            wanted[row, place] += weights[row, place, e] * experts.experts[e](x[row, place])
    assert int(chosen.sum(1).max()) > room, "nothing would be dropped"
    torch.testing.assert_close(experts(x), wanted, rtol=1e-12, atol=1e-14)


def test_with_a_capacity_tokens_depend_neither_on_later_ones_nor_on_other_rows() -> None:
    model = GPT(layers=2, width=16, heads=2, experts=4, active=2, capacity=1.0).build(Tokens(length=12, vocabulary=11))
    model.double()
    batch = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(2))
    changed = batch.clone()
    changed[0, 7], changed[1:] = (changed[0, 7] + 1) % 11, (changed[1:] + 1) % 11
    torch.testing.assert_close(model(batch)[0, :7], model(changed)[0, :7], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model(batch)[:1], model(batch[:1]), rtol=1e-12, atol=1e-14)


# ── the balance of the load ─────────────────────────────────────────────────────────────────────────────────────


def test_the_balance_is_1_if_even_or_all_are_active_and_the_number_of_experts_if_one_has_all() -> None:
    logits = 50 * torch.eye(COUNT).repeat(1, 2, 1)  # each token another expert
    assert balance(logits, choice(logits, 1)[1]).tolist() == pytest.approx([1.0])
    logits = torch.randn(2, 7, COUNT)
    assert balance(logits, choice(logits, COUNT)[1]).tolist() == pytest.approx([1.0, 1.0])
    logits = torch.tensor([0.0, 0.0, 50.0, 0.0, 0.0]).expand(1, 7, COUNT)
    assert balance(logits, choice(logits, 1)[1]).tolist() == pytest.approx([COUNT])


def rows_of_text(count: int) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(3)
    return torch.randint(11, (count, 8), generator=numbers), torch.randint(11, (count, 8), generator=numbers)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def sparse_gpt(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = {"layers": 2, "width": 16, "heads": 2, "experts": 4, "active": 2, "balance": 1.0, **settings}
    return GPT(**spec).build(Tokens(length=8, vocabulary=11)).double()


def test_the_loss_of_a_batch_is_the_mean_of_its_rows_losses() -> None:
    model, (x, y) = sparse_gpt(), rows_of_text(6)
    loss = with_balance(model, cross_entropy)
    each = [loss(model, (x[k : k + 1], y[k : k + 1])) for k in range(6)]
    torch.testing.assert_close(loss(model, (x, y)), torch.stack(each).mean(), rtol=1e-12, atol=0)
    assert loss(model, (x, y)) > cross_entropy(model, (x, y)) + 2  # two layers, each at least … 1 in the mean


def test_over_items_each_item_has_the_balance_of_its_row() -> None:
    model, (x, y) = sparse_gpt(), rows_of_text(4)
    y[0, 2:], y[1, 5:] = -100, -100
    counts = (y >= 0).sum(1)
    loss = with_balance(model, cross_entropy, lambda batch: (batch[1] >= 0).sum(1))
    each = torch.stack([loss(model, (x[k : k + 1], y[k : k + 1])) for k in range(4)])
    torch.testing.assert_close(loss(model, (x, y)), (each * counts).sum() / counts.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("active", [1, 2, 4])
def test_one_micro_batch_and_many_make_the_same_update(active: int) -> None:
    (x, y), after = rows_of_text(12), list[Tensor]()
    for accum in (1, 4, 12):
        model = sparse_gpt(active=active, capacity=1.0)
        settings = {"spec": Torch(precision="float64"), "optimizer": SGD(momentum=0.0)}
        engine = TorchEngine(model, with_balance(model, cross_entropy), **settings)
        plan = Plan(batch=12, world=1, micro=12 // accum, accum=accum, lr=0.5, stage=0)
        outcome = engine.update(
            plan, [(x[rows.start : rows.stop], y[rows.start : rows.stop]) for rows in plan.rows(0, 0)]
        )
        assert outcome.applied
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        engine.close()
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=1e-11, atol=1e-13)


# ── what cannot be ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"experts": 4, "active": 5}, "active=5 exceeds experts=4"),
        ({"experts": 4, "active": {"start": 1, "end": 8}}, "active=8 exceeds experts=4"),
        ({"experts": 4}, "experts=4 needs active"),
        ({"active": 2}, "active is of experts, and the model has none"),
        ({"experts": 0, "capacity": 1.5}, "capacity is of experts"),
        ({"experts": 4, "active": 2, "capacity": 0.5}, "capacity=0.5 is below 1"),
        ({"experts": 4, "active": 0}, "active"),
        ({"experts": -1, "active": 1}, "experts"),
    ],
)
def test_experts_that_do_not_fit_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        GPT(**settings)
