"""A backward pass and a norm by a shorter way are torch's own to the last bit, and special tensors keep torch's way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgrow.engine import raw_backward
from distgrow.engine.clipping import GradientNorm
from distgrow.engine.raw_backward import backward


def made(run: Callable[[Tensor], None], *, twice: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    for _ in range(1 + twice):
        run(nn.functional.cross_entropy(model(torch.randn(6, 7)), torch.arange(6) % 3))
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("twice", [False, True])
def test_gradients_are_those_of_torch_and_add_up(twice: bool) -> None:
    found, own = made(backward, twice=twice), made(lambda loss: loss.backward(), twice=twice)
    assert len(found) == 4
    assert all(map(torch.equal, found, own))


def test_hooks_on_the_loss_and_on_leaves_see_the_same_gradients() -> None:
    seen: list[float] = []
    leaf = torch.tensor(3.0, requires_grad=True)
    loss = leaf * leaf
    loss.register_hook(lambda gradient: seen.append(gradient.item()))
    leaf.register_hook(lambda gradient: seen.append(gradient.item()))
    backward(loss)
    assert seen == [1.0, 6.0]


def test_a_tensor_with_a_backward_of_its_own_keeps_it() -> None:
    class Own(Tensor):
        called = False

        def backward(self, *args: object, **kwargs: object) -> None:
            Own.called = True

    backward(torch.ones(()).as_subclass(Own))
    assert Own.called


def test_a_complex_loss_is_refused_as_torch_refuses_it() -> None:
    with pytest.raises(RuntimeError, match="real"):
        backward(torch.ones((), dtype=torch.complex64, requires_grad=True) * 2)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_loss_that_is_no_single_number_is_treated_as_torch_treats_it(length: int) -> None:
    leaf = torch.ones(length, requires_grad=True)
    if length == 1:
        backward(leaf * 2)
        assert torch.equal(leaf.grad, torch.full((1,), 2.0))  # pyright: ignore[reportArgumentType]
        return
    with pytest.raises(RuntimeError, match="scalar outputs"):
        backward(leaf * 2)


@pytest.mark.parametrize("owner", [Tensor, torch.autograd])
def test_a_backward_that_somebody_has_put_in_place_of_torchs_is_called(
    owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen = owner.backward, list[object]()
    monkeypatch.setattr(owner, "backward", lambda loss, *a, **more: (seen.append(loss), own(loss, *a, **more))[1])
    leaf = torch.tensor(3.0, requires_grad=True)
    backward(leaf * leaf)
    assert len(seen) == 1
    assert leaf.grad == 6


def test_a_torch_without_the_private_function_makes_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(backward)
    monkeypatch.setattr(raw_backward, "_run", None)
    assert all(map(torch.equal, made(backward), found))


@pytest.mark.parametrize("missing", [None, 1, 2])
@pytest.mark.parametrize(
    "dtypes", [["float32"] * 3, ["float32", "float64", "float32"], ["float32", "complex64", "float32"]]
)
def test_the_norm_is_torchs_to_the_last_bit(missing: int | None, dtypes: list[str]) -> None:
    parameters = [nn.Parameter(torch.zeros(40, k + 1, dtype=getattr(torch, name))) for k, name in enumerate(dtypes)]
    norm = GradientNorm(parameters)
    for number in range(3):
        torch.manual_seed(number)
        for k, parameter in enumerate(parameters):
            parameter.grad = None if k == missing and number else torch.randn_like(parameter)
        given = [parameter.grad for parameter in parameters if parameter.grad is not None]
        expected = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(given)))  # pyright: ignore[reportPrivateImportUsage]
        assert torch.equal(norm(), expected)


def test_a_norm_is_not_changed_by_the_next_one() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    norm = GradientNorm([parameter])
    parameter.grad = torch.tensor([3.0, 4.0, 0.0])
    first = norm()
    parameter.grad = torch.tensor([0.0, 0.0, 2.0])
    assert (norm().item(), first.item()) == (2.0, 5.0)
