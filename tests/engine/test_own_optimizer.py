"""Optimizers of the user's own make the steps that they make in a loop by hand; what cannot be one is refused."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import events
from torch import Tensor, nn
from typer.testing import CliRunner

from distgrow import RunSpec, Torch, budget, constant_lr, every, exponential, fit, load_weights, own
from distgrow.checkpoint.spec import Checkpointing
from distgrow.cli import app
from distgrow.config.load import parse
from distgrow.core.errors import ConfigError, RunError
from distgrow.core.order import Order
from distgrow.engine.compatible import check_compatible
from distgrow.engine.spec import DeepSpeed
from distgrow.growth.cabs import CABS

ROWS, SIZES = 48, [8, 8, 8, 16, 16, 16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class ScheduleFree(torch.optim.Optimizer):
    """The parameters of eval() are the mean of all that SGD came to; train() goes back (as the method of that name)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "training": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            assert group["training"], "step() in evaluation mode"
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("mean", torch.zeros_like(p))
                state["count"] = state.get("count", 0) + 1
                p.sub_(group["lr"] * p.grad)
                state["mean"].lerp_(p, 1 / state["count"])

    def train(self) -> None:
        self._turn(True)

    def eval(self) -> None:
        self._turn(False)

    @torch.no_grad()
    def _turn(self, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                group["training"] = training
                for p in group["params"]:
                    if "mean" in self.state[p]:
                        mean = self.state[p]["mean"]
                        kept = p.clone()
                        p.copy_(mean)
                        mean.copy_(kept)


def halves(net: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(net.body.parameters(), lr=0.02), torch.optim.SGD(net.head.parameters(), lr=0.1)]


def grouped(net: Any) -> torch.optim.Optimizer:
    groups = [{"params": [net.body.weight, net.head.weight]}, {"params": [net.body.bias, net.head.bias], "lr": 0.2}]
    return torch.optim.Adagrad(groups, lr=0.05, weight_decay=0.01)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "Adadelta": lambda net: torch.optim.Adadelta(net.parameters(), lr=1.0),
    "RAdam": lambda net: torch.optim.RAdam(net.parameters(), lr=0.01),
    "groups": grouped,
    "groups, no default": lambda net: torch.optim.SGD(
        [{"params": net.body.parameters(), "lr": 0.1}, {"params": net.head.parameters(), "lr": 0.3}], lr=0.0
    ),
    "two": halves,
    "schedule-free": lambda net: ScheduleFree(net.parameters(), 0.1),
}


class Fixed(torch.optim.SGD):
    """Steps of a size of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            del group["lr"]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data() -> torch.utils.data.TensorDataset:
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 3, generator=numbers, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())


def trained(folder: Path, optimizer: Any, net: nn.Module, **arguments: Any) -> Any:
    return fit(
        net, loss, data(), test=data(), growth=exponential(8, 2, 16), stages=every(steps=3), optimizer=optimizer,
        budget=budget(steps=6), engine=Torch(max_micro=4, precision="float64", device="cpu"),
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=2, keep=9)), **{"lr": None, **arguments},
    )  # fmt: skip


def by_hand(make: Callable[[Any], Any]) -> Net:
    """The same batches in a loop of one's own, with square-root scaling."""
    net, position = Net(), 0
    made = make(net)
    optimizers = made if isinstance(made, list) else [made]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    rows = data()[Order(n=ROWS)(range(sum(SIZES)))[1]]
    for size in SIZES:
        batch = [part[position : position + size] for part in rows]
        position += size
        net.zero_grad()
        loss(net, batch).backward()
        for optimizer, its in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, its, strict=True):
                group["lr"] = rate * (size / 8) ** 0.5
            optimizer.step()
    for optimizer in optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.eval()
    return net


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("built", [True, False], ids=["object", "function"])
def test_the_steps_are_those_of_a_loop_by_hand(name: str, built: bool, tmp_path: Path) -> None:
    net, make = Net(), MAKERS[name]
    trained(tmp_path / "run", make(net) if built else make, net)
    for ours, theirs in zip(net.parameters(), by_hand(make).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", MAKERS)
def test_resumed_it_ends_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    whole, resumed = Net(), Net()
    trained(tmp_path / "run", MAKERS[name], whole)
    for checkpoint in sorted((tmp_path / "run/checkpoints").iterdir())[2:]:
        shutil.rmtree(checkpoint)
    trained(tmp_path / "run", MAKERS[name], resumed, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_evaluation_and_checkpoints_have_the_parameters_of_evaluation_mode(tmp_path: Path) -> None:
    net = Net()
    result = trained(tmp_path / "run", MAKERS["schedule-free"], net)
    rows = [part.clone() for part in data()[:]]
    assert result.metrics["loss"] == pytest.approx(float(loss(net, rows)), rel=1e-9)  # fit gives eval()'s back
    last = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    kept = torch.load(last / "engine.pt", weights_only=True)
    assert all(torch.equal(kept["evaluated"][name], p) for name, p in net.named_parameters())
    assert not torch.equal(kept["model"]["head.weight"], net.head.weight)
    loaded = Net()
    load_weights(loaded, tmp_path / "run")
    assert torch.equal(loaded.head.weight, net.head.weight)


def bad(kind: str) -> tuple[Any, dict[str, Any]]:
    net, other = Net(), Net()
    both = {"SGD twice": [torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(net.parameters(), lr=0.1)]}
    shared = torch.optim.SGD(net.parameters(), lr=0.1)
    shared.param_groups.append({**shared.param_groups[0], "params": [net.head.bias]})  # add_param_group() would see it
    stepped = torch.optim.AdamW(net.parameters(), lr=0.1)
    loss(net, [part[:4] for part in data()[:]]).backward()
    stepped.step()
    return net, {
        "foreign": {"optimizer": torch.optim.SGD(other.parameters(), lr=0.1)},
        "missing": {"optimizer": torch.optim.SGD(net.body.parameters(), lr=0.1)},
        "twice": {"optimizer": both["SGD twice"]},
        "another rate": {"optimizer": torch.optim.SGD(net.parameters(), lr=0.1), "lr": constant_lr(0.2)},
        "closure": {"optimizer": torch.optim.LBFGS(net.parameters())},
        "maximising": {"optimizer": torch.optim.AdamW(net.parameters(), lr=0.1, maximize=True)},
        "stepped": {"optimizer": stepped},
        "no rate": {"optimizer": Fixed(net.parameters())},
        "one group twice": {"optimizer": shared},
        "function": {"optimizer": lambda model: model},
        "no return": {"optimizer": lambda model: None},
        "with a scheduler": {"optimizer": lambda model: {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}},
        "text": {"optimizer": "adamw"},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("foreign", "4 parameters, of shape .*neither the model's"),
        ("missing", "no group for head.weight, head.bias.*requires_grad=False"),
        ("twice", "one optimizer"),
        ("another rate", "lr=0.1, but lr.base is 0.2"),
        ("closure", "LBFGS needs a closure"),
        ("maximising", "AdamW has maximize=True.*times −1"),
        ("stepped", "AdamW has made steps already"),
        ("no rate", "Fixed has no lr in its parameter groups"),
        ("one group twice", "head.bias more than once"),
        ("function", r"<lambda>\(model\) returned a Net; it must return"),
        ("no return", r"<lambda>\(model\) returned None; it must return"),
        ("with a scheduler", r"<lambda>\(model\) returned a dict; it must return"),
        ("text", "optimizer='adamw'.*allowed is"),
    ],
)
def test_what_cannot_train_the_model_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    net, arguments = bad(kind)
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path / "run", arguments.pop("optimizer"), net, **arguments)


def test_a_partial_is_the_class_or_function_with_its_arguments(tmp_path: Path) -> None:
    def made(net: Net, rate: float) -> torch.optim.Optimizer:
        return torch.optim.RAdam(net.parameters(), lr=rate)

    ends = [by_hand(MAKERS["RAdam"])]
    for name, optimizer in {"class": partial(torch.optim.RAdam, lr=0.01), "function": partial(made, rate=0.01)}.items():
        ends.append(Net())
        trained(tmp_path / name, optimizer, ends[-1])
    for first, *others in zip(*(net.parameters() for net in ends), strict=True):
        for other in others:
            torch.testing.assert_close(first, other, rtol=1e-11, atol=1e-13)


def changeable(
    net: Net, *, betas: Any = (0.9, 0.99), decay: float = 0.1, rate: float = 0.02, momentum: float = 0.5
) -> Any:
    """Two optimizers, the first with two groups."""
    weights, biases = {"params": [net.body.weight], "weight_decay": decay}, {"params": [net.body.bias], "lr": rate}
    adam = torch.optim.AdamW([weights, biases], lr=0.01, betas=betas)
    return [adam, torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=momentum)]


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"betas": (0.8, 0.99)}, "settings.betas"),
        ({"decay": 0.2}, "groups.0.weight_decay"),
        ({"rate": 0.03}, "groups.1.lr_scale"),
        ({"momentum": 0.9}, "groups.2.momentum"),
    ],
)
def test_a_setting_that_has_changed_is_told_on_resume_and_not_passed_over(
    changed: dict[str, Any], key: str, tmp_path: Path
) -> None:
    net = Net()
    trained(tmp_path / "run", changeable(net), net)
    with pytest.raises(RunError, match=f"{key}: .* in the folder, .* now"):
        trained(tmp_path / "run", changeable(net := Net(), **changed), net, resume=True)
    config = tmp_path / "run/config.yaml"
    settings = yaml.safe_load(config.read_text())
    del settings["optimizer"]["settings"]["groups"], settings["optimizer"]["settings"]["betas"]
    config.write_text(yaml.safe_dump(settings))
    trained(tmp_path / "run", changeable(net := Net()), net, resume=True)  # a folder of a version that recorded fewer


@pytest.mark.parametrize("built", [True, False], ids=["object", "function"])
def test_the_start_shows_the_groups_of_an_own_optimizer(built: bool, tmp_path: Path) -> None:
    for name, make in {"three": changeable, "one": MAKERS["RAdam"]}.items():
        net = Net()
        trained(tmp_path / name, make(net) if built else make, net)
    assert "groups" not in events(tmp_path / "one", "start")[0]
    assert events(tmp_path / "three", "start")[0]["groups"] == [
        "parameters of AdamW, group 0: 1, 12 numbers, weight_decay 0.1",
        "parameters of AdamW, group 1: 1, 4 numbers, lr_scale 2, weight_decay 0.01",
        "parameters of SGD, group 0: 2, 10 numbers, lr_scale 10, weight_decay 0",
    ]


def test_a_rule_for_sgd_without_momentum_takes_an_object_that_is_that_alone() -> None:
    net = Net()
    parts = [{"params": net.body.parameters()}, {"params": net.head.parameters(), "momentum": 0.9}]
    check_compatible(CABS(start=8, cap=16), own(torch.optim.SGD(net.parameters(), lr=0.1)), Torch())
    for other in (torch.optim.SGD(parts, lr=0.1), torch.optim.Adam(net.parameters()), halves(net)):
        with pytest.raises(ConfigError, match="SGD without momentum"):
            check_compatible(CABS(start=8, cap=16), own(other), Torch())


def test_deepspeed_takes_torchs_elementwise_optimizers_and_those_that_say_so() -> None:
    net = Net()
    engine = DeepSpeed(zero=1)
    engine.check_optimizer(own(torch.optim.Adadelta(net.parameters())))
    engine.check_optimizer(own(ScheduleFree(net.parameters(), 0.1), elementwise=True))
    adagrad = torch.optim.Adagrad(net.parameters())  # ZeRO does not resume its state
    for unknown in (adagrad, ScheduleFree(net.parameters(), 0.1), torch.optim.Muon([net.body.weight, net.head.weight])):
        with pytest.raises(ConfigError, match="elementwise"):
            engine.check_optimizer(own(unknown))


def test_a_config_names_a_class_or_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rates.py").write_text(
        "import torch\n\n\ndef slow(model, lr):\n"
        "    weights = [p for p in model.parameters() if p.dim() > 1]\n"
        "    rest = [p for p in model.parameters() if p.dim() < 2]\n"
        "    return [torch.optim.Adadelta(weights, lr=lr), torch.optim.SGD(rest, lr=lr / 2)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base = {"budget": {"samples": 64}, "model": {"kind": "mlp", "hidden": [4]}, "lr": {"base": 1.0}}
    for target, args in (("torch.optim:Adadelta", {"rho": 0.95}), ("rates:slow", {"lr": 1.0})):
        optimizer = {"kind": "target", "target": target, "args": args}
        run = {"dir": str(tmp_path / target.partition(":")[2])}
        assert parse({**base, "optimizer": optimizer, "run": run}).fit().progress.ledger.applied == 64
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump({**base, "optimizer": {"kind": "target", "target": "rates:slow", "args": {"lr": 1.0}}})
    )
    planned = CliRunner().invoke(app, ["plan", str(config)])
    assert "parameters of Adadelta, group 0: 2, 296 numbers" in planned.output
    for target, args, said in (
        ("torch.optim:Adadelta", {"rh": 0.95}, "args=.*do not fit"),
        ("torch.optim", {}, "package.module:name"),
        ("torch.optim:Nothing", {}, "package.module:name"),
        ("nowhere:slow", {}, "does not import"),
        ("rates:slow", {"lr": 0.5}, "lr=0.5, but lr.base is 1"),
    ):
        optimizer = {"kind": "target", "target": target, "args": args}
        with pytest.raises(ConfigError, match=said):
            parse({**base, "optimizer": optimizer, "run": {"dir": str(tmp_path / "refused")}}).fit()
        config.write_text(yaml.safe_dump({**base, "optimizer": optimizer}))
        with pytest.raises(ConfigError, match=said):
            CliRunner().invoke(app, ["plan", str(config)], catch_exceptions=False)
