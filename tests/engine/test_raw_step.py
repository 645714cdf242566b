"""A step without what torch puts around it is the same step, and everything that wants to see a step still does."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torchs
from torch import Tensor, nn

from distgrow.optim.raw_step import step

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, fused=True),
    "maximizing": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}


def parameters(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32)) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(5, 3, dtype=dtype)) for dtype in dtypes]


def groups(given: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": given[:1]}, {"params": given[1:], "lr": 0.03}]


def give(given: list[nn.Parameter], number: int, missing: int | None = None) -> None:
    torch.manual_seed(number)
    for k, parameter in enumerate(given):
        parameter.grad = None if k == missing else torch.randn_like(parameter)


def after(build: Any, make: Any, missing: int | None = None, given: list[nn.Parameter] | None = None) -> list[Tensor]:
    given = parameters() if given is None else given
    optimizer = build(groups(given))
    for number in range(4):
        give(given, number, missing if number % 2 else None)
        make(optimizer)
    return [parameter.detach() for parameter in given]


@pytest.mark.parametrize("missing", [None, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_optimizers_own_step_to_the_last_bit(name: str, missing: int | None) -> None:
    build = OPTIMIZERS[name]
    own = after(build, lambda optimizer: optimizer.step(), missing)
    assert all(map(torch.equal, after(build, step, missing), own))
    assert not any(map(torch.equal, own, parameters()))


def test_a_group_of_two_precisions_is_stepped_too() -> None:
    build: Any = lambda p: torch.optim.SGD([q for group in p for q in group["params"]], lr=0.1, fused=True)  # noqa: E731
    mixed = (torch.float32, torch.float64)
    own = after(build, lambda optimizer: optimizer.step(), given=parameters(mixed))
    assert all(map(torch.equal, after(build, step, given=parameters(mixed)), own))


def test_hooks_of_the_optimizer_and_of_all_optimizers_are_called() -> None:
    given, seen = parameters(), list[str]()
    optimizer = torch.optim.SGD(given, lr=0.1, fused=True)
    give(given, 0)
    step(optimizer)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("own, before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("own, after")),
    ]
    step(optimizer)
    for handle in handles:
        handle.remove()
    handles = [torchs.register_optimizer_step_pre_hook(lambda *_: seen.append("all, before"))]
    handles += [torchs.register_optimizer_step_post_hook(lambda *_: seen.append("all, after"))]
    step(optimizer)
    for handle in handles:
        handle.remove()
    step(optimizer)
    assert seen == ["own, before", "own, after", "all, before", "all, after"]


@pytest.mark.parametrize("again", ["copied", "loaded"])
def test_an_optimizer_that_was_not_built_fused_but_is_so_now_steps(again: str) -> None:
    """A copy, and one that has loaded a fused one's groups, have not all that torch gives one that is built."""
    steps: list[list[Tensor]] = []
    for make in (step, torch.optim.SGD.step):
        given = parameters()
        optimizer = torch.optim.SGD(given, lr=0.1, fused=True)
        if again == "copied":
            optimizer = copy.deepcopy(optimizer)
        else:
            saved, optimizer = optimizer.state_dict(), torch.optim.SGD(given, lr=0.2)
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["fused"]
        own: list[nn.Parameter] = optimizer.param_groups[0]["params"]
        for number in range(3):
            give(own, number)
            make(optimizer)
        steps.append([parameter.detach() for parameter in own])
    assert all(map(torch.equal, *steps))


@pytest.mark.parametrize("names", [("found_inf",), ("grad_scale", "found_inf")])
def test_a_step_that_a_gradient_scaler_skips_is_skipped(names: tuple[str, ...]) -> None:
    given = parameters()
    optimizer = torch.optim.SGD(given, lr=0.1, fused=True)
    give(given, 0)
    step(optimizer)
    before = [parameter.detach().clone() for parameter in given]
    for name in names:
        setattr(optimizer, name, torch.ones(()))
    step(optimizer)
    assert all(map(torch.equal, before, given))
    for name in names:
        delattr(optimizer, name)
    step(optimizer)
    assert not any(map(torch.equal, before, given))


@pytest.mark.parametrize(("owner", "name"), [(torch, "_fused_sgd_"), (torch.autograd, "_profiler_enabled")])
def test_a_torch_without_a_private_name_makes_its_own_step(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda _, closure=None: seen.append("torch's"))
    optimizer = torch.optim.SGD(parameters(), lr=0.1, fused=True)
    optimizer._need_device_dtype_check_for_fused = False
    monkeypatch.delattr(owner, name)
    step(optimizer)
    assert seen == ["torch's"]


def test_a_package_whose_name_begins_as_torchs_is_none_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(optimizer: Any) -> None:
        assert torch.is_grad_enabled()

    code = foreign.__code__.replace(co_filename=torchs.__file__.replace("/torch/", "/torch_own/"))
    foreign.__code__ = code
    monkeypatch.setattr(torch.optim.RMSprop, "step", foreign)
    step(torch.optim.RMSprop(parameters(), lr=0.1))


def test_a_profiler_sees_the_step() -> None:
    given = parameters()
    optimizer = torch.optim.SGD(given, lr=0.1, fused=True)
    give(given, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(optimizer)
    assert any(event.key == "Optimizer.step#SGD.step" for event in profiler.key_averages())


def test_a_step_that_somebody_has_put_in_place_of_torchs_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append("a subclass")
            return super().step(closure)

    given = parameters()
    give(given, 0)
    step(Own(given, lr=0.1))
    optimizer = torch.optim.SGD(given, lr=0.1, fused=True)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    step(optimizer)
    assert optimizer._opt_called  # pyright: ignore[reportAttributeAccessIssue] what torch's schedulers put there
    before = torch.optim.RMSprop.step

    @functools.wraps(before)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen.append("a wrapped class")
        return before(*args, **kwargs)

    monkeypatch.setattr(torch.optim.RMSprop, "step", wrapped)
    step(torch.optim.RMSprop(given, lr=0.1))
    assert seen == ["a subclass", "a wrapped class"]
