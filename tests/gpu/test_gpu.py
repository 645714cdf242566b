"""One GPU: the same run as on the CPU, to floating-point tolerance; `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
from conftest import Commands, ledger, parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]


def test_a_gpu_run_agrees_with_the_cpu(distgrow: Commands) -> None:
    double = "engine.precision=float64"
    assert distgrow.train("cpu", double, "engine.device=cpu").code == 0
    assert distgrow.train("gpu", double, "engine.device=cuda").code == 0
    one, other = parameters(distgrow.folder / "cpu"), parameters(distgrow.folder / "gpu").cpu()
    assert (one - other).norm() <= 1e-9 * one.norm()
    assert ledger(distgrow.folder / "cpu") == ledger(distgrow.folder / "gpu")


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.precision=bfloat16", "model={kind: resnet8, norm: batch}"),
        ("engine.compile=true", "engine.max_micro=8"),
        ("run.loader.workers=2", "optimizer={kind: adamw}"),
    ],
)
def test_a_gpu_run_finishes_and_resumes(distgrow: Commands, overrides: tuple[str, ...]) -> None:
    assert distgrow.train("gpu", *overrides).code == 0
    assert distgrow.train("gpu", *overrides, resume=True).code == 0
    assert ledger(Path(distgrow.folder / "gpu"))["applied"] == 1500


def test_verify_holds_on_a_gpu(distgrow: Commands) -> None:
    config = str(Path(__file__).parents[2] / "configs/digits.yaml")
    assert distgrow("verify", config, "engine.precision=float64", "engine.device=cuda").code == 0
