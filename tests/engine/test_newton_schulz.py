"""Muon's orthogonal momentum in float32: the polynomial of singular values, torch's own steps, rows of a matrix."""

import pytest
import torch
from torch import Tensor, nn

from distgrow import Muon
from distgrow.optim.joined import newton_schulz

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def gradient(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (9, 4), (1, 6), (6, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_every_singular_value_goes_through_the_polynomial(shape: tuple[int, int], steps: int) -> None:
    matrix = gradient(*shape).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    values = values / matrix.norm()
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(
        newton_schulz(matrix, COEFFICIENTS, steps=steps, eps=1e-7), left @ torch.diag(values) @ right
    )


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not newton_schulz(torch.zeros(3, 4), COEFFICIENTS, steps=5, eps=1e-7).any()


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_in_float32_are_those_of_torch_up_to_bfloat16(
    adjust: str, shape: tuple[int, int], nesterov: bool
) -> None:
    steps: dict[str, Tensor] = {}
    for precision in ("bfloat16", "float32"):
        layer = nn.Linear(shape[1], shape[0], bias=False)
        with torch.no_grad():
            layer.weight.copy_(gradient(*shape, seed=9))
        spec = Muon.model_validate({"ns_precision": precision, "adjust": adjust, "nesterov": nesterov})
        optimizer = spec.made(dict(layer.named_parameters()), layer)
        optimizer.param_groups[0]["lr"] = 0.1
        for seed in range(3):
            layer.weight.grad = gradient(*shape, seed=seed)
            optimizer.step()
        steps[precision] = layer.weight.detach() - gradient(*shape, seed=9)
    apart = (steps["float32"] - steps["bfloat16"]).norm() / steps["float32"].norm()
    assert 0 < apart < 0.01


def test_other_last_bits_of_a_gradient_stay_last_bits() -> None:
    matrix = gradient(15, 30)
    near = matrix * (1 + 1e-7 * gradient(15, 30, seed=1))
    one, other = (newton_schulz(each, COEFFICIENTS, steps=5, eps=1e-7) for each in (matrix, near))
    assert (one - other).norm() / one.norm() < 1e-5
