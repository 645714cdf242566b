"""Parameter groups: the same updates as torch's own groups make, and what a group cannot be."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from distgrow import SGD, AdamW
from distgrow.cli import app
from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.engine.torch import TorchEngine
from distgrow.optim import OptimizerSpec
from distgrow.optim.groups import ParameterGroup


class Net(nn.Module):
    """Two layers and a norm, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).tanh())


GROUPS = [
    ParameterGroup(match="^head", ndim=2, lr_scale=0.1, weight_decay=0.5),
    ParameterGroup(match="head|norm.weight", lr_scale=2.0),
]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    numbers = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, generator=numbers, dtype=torch.float64), torch.randint(2, (8,), generator=numbers))
        for _ in range(count)
    ]


def by_hand(net: Net, decay: float) -> list[dict[str, Any]]:
    """GROUPS and no_decay, written out."""
    return [
        {"params": [net.head.weight], "lr": 0.01, "weight_decay": 0.5},
        {"params": [net.norm.weight, net.head.bias], "lr": 0.2, "weight_decay": decay},
        {"params": [net.body.bias, net.norm.bias], "weight_decay": 0.0},
        {"params": [net.body.weight], "weight_decay": decay},
    ]


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        (SGD(momentum=0.9, weight_decay=0.1, groups=GROUPS, no_decay=True), torch.optim.SGD),
        (AdamW(weight_decay=0.1, groups=GROUPS, no_decay=True), torch.optim.AdamW),
    ],
)
def test_updates_are_those_of_torchs_own_groups(spec: OptimizerSpec, made: Any) -> None:
    ours, theirs = Net(), Net()
    engine = TorchEngine(ours, loss, optimizer=spec)
    options: dict[str, Any] = {"momentum": 0.9} if made is torch.optim.SGD else {}
    optimizer = made(by_hand(theirs, 0.1), lr=0.1, **options)
    for batch in batches(6):
        engine.update(Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0), [batch])
        optimizer.zero_grad()
        loss(theirs, batch).backward()
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_the_objective_has_each_groups_own_penalty() -> None:
    net = Net()
    engine = TorchEngine(net, loss, optimizer=SGD(weight_decay=0.1, groups=GROUPS, no_decay=True))
    (batch,) = batches(1)
    _, gradient = engine.functional().gradient(batch)
    total = loss(net.eval(), batch)
    for group in by_hand(net, 0.1):
        total = total + group["weight_decay"] / 2 * sum(p.square().sum() for p in group["params"])
    expected = torch.autograd.grad(total, list(net.parameters()))
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_noise_and_progress_are_of_the_penalised_gradient_and_the_step_that_was_made(momentum: float) -> None:
    net = Net()
    spec = SGD(weight_decay=0.1, momentum=momentum, groups=GROUPS, no_decay=True)
    engine = TorchEngine(net, loss, optimizer=spec)
    plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0, window=1, product=True)
    moved: list[Tensor] = []
    for batch in batches(3):
        whole = engine.functional().gradient(batch)[1]  # no dropout: eval mode is the same
        before = [p.detach().clone() for p in net.parameters()]
        measured = engine.update(plan, [batch]).measured
        assert measured.batch_sq == pytest.approx(sum(float(g.square().sum()) for g in whole), rel=1e-9)
        if moved:
            product = sum(float((g * m).sum()) for g, m in zip(whole, moved, strict=True)) / 0.1
            assert measured.product == pytest.approx(product, rel=1e-6)
        moved = [old - new.detach() for old, new in zip(before, net.parameters(), strict=True)]


def test_a_group_of_learning_rate_zero_stays_and_leaves_the_product_finite() -> None:
    net = Net()
    engine = TorchEngine(net, loss, optimizer=SGD(groups=[ParameterGroup(match="head", lr_scale=0.0)]))
    plan = Plan(batch=8, world=1, micro=8, accum=1, lr=0.1, stage=0, product=True)
    kept = net.head.weight.detach().clone()
    products = [engine.update(plan, [batch]).measured.product for batch in batches(3)]
    assert torch.equal(net.head.weight, kept)
    assert math.isfinite(products[-1])


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([ParameterGroup(match="biasses")], r"groups\[0\]: match='biasses' meets no parameter.*body.weight"),
        ([ParameterGroup(ndim=1), ParameterGroup(match="bias")], r"groups\[1\]: match='bias' meets only .*earlier"),
    ],
)
def test_a_group_without_parameters_is_refused(groups: list[ParameterGroup], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TorchEngine(Net(), loss, optimizer=SGD(groups=groups))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("[{match: '('}]", "no regular expression"),
        ("[{lr_scale: 2}]", "needs match or ndim"),
        ("[{match: a, lr_scale: -1}]", "lr_scale"),
        ("[{match: a, decay: 1}]", "decay"),
        ("{match: a}", "optimizer.groups"),
    ],
)
def test_a_group_that_cannot_be_is_refused(groups: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(apply({"budget": {"epochs": 1}}, f"optimizer.groups={groups}"))


def test_plan_and_the_runs_start_show_how_many_parameters_a_group_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(
        "optimizer: {kind: sgd, no_decay: true, weight_decay: 0.1, groups: [{match: '^3', ndim: 2, lr_scale: 0.5}]}\n"
        f"model: {{kind: mlp, hidden: [8]}}\nbudget: {{samples: 64}}\nrun: {{dir: {tmp_path / 'run'}}}\n"
    )
    shown = ""
    for command in ("plan", "train"):
        result = CliRunner().invoke(app, [command, str(tmp_path / "config.yaml")])
        assert result.exit_code == 0, result.output
        shown += result.output + capsys.readouterr().out
    for line in (
        "parameters of match='^3', ndim=2: 1, 80 numbers, lr_scale 0.5",
        "parameters of no_decay: 2, 18 numbers, weight_decay 0",
        "parameters of rest: 1, 512 numbers",
    ):
        assert shown.count(line) == 2
