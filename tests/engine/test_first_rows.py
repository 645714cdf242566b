"""What a few rows show is refused before a run has a folder, and a model that passes is left as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distgrow import ConfigError, RunSpec, Torch, batches, budget, constant, every, fit
from distgrow.core.stages import Stages
from distgrow.growth import Growth

GENERATOR = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(24, 4, 3, generator=GENERATOR), torch.randint(0, 2, (24,), generator=GENERATOR))


def flat(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), norm or nn.BatchNorm1d(5), nn.Linear(5, 2))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    folder: Path,
    loss: Callable[..., Any] = cross_entropy,
    model: nn.Module | None = None,
    growth: Growth | None = None,
    max_micro: int = 8,
    stages: Stages | None = None,
    **more: Any,
) -> Any:
    return fit(
        model or flat(), loss, DATA, growth=growth or constant(8), budget=budget(samples=24), stages=stages,
        engine=Torch(max_micro=max_micro), run=RunSpec(dir=str(folder / "run")), **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda model, batch: cross_entropy(model, batch)[None], r"shape \(1,\)"),
        (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), r"shape \(8,\)"),
        (lambda model, batch: float(cross_entropy(model, batch)), "returned float"),
        (lambda model, batch: {"loss": cross_entropy(model, batch)}, "returned dict"),
        (lambda model, batch: None, "returned NoneType"),
        (lambda model, batch: cross_entropy(model, batch).detach(), "no gradient"),
    ],
)
def test_a_loss_of_a_wrong_shape_or_type_leaves_no_folder(loss: Callable[..., Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the loss .*{told}"):
        train(tmp_path, loss)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (0.5, "the metrics are a float; return a dict"),
        ({"hits": torch.ones(8)}, r"the metric 'hits' has shape \(8,\)"),
        ({"hits": (1, 2, 3)}, "'hits' has 3 values"),
        ({"hits": "many"}, "'hits' is a str"),
        ({"step": 1.0}, "task.metrics returns step, which every event has"),
    ],
)
def test_metrics_of_a_wrong_shape_or_type_leave_no_folder(values: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        train(tmp_path, test=DATA, metrics=lambda model, batch: values)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_one_in_training_mode_alone_is_trained(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        return cross_entropy(model, batch) if model.training else "no loss to be had"

    assert train(tmp_path, loss).progress.samples == 24


def test_code_that_fails_on_its_first_call_is_judged_by_the_first_update(tmp_path: Path) -> None:
    calls = list[int]()

    def loss(model: nn.Module, batch: Any) -> Any:
        calls.append(len(batch[0]))
        if not model.training:
            raise RuntimeError("made for training")
        return cross_entropy(model, batch)

    assert train(tmp_path, loss).progress.samples == 24


@pytest.mark.parametrize(
    ("growth", "max_micro", "rows"),
    [(constant(1), 8, "growth.start=1"), (constant(8), 1, "engine.max_micro=1"), (constant(3), 2, "engine.max_micro=2"),
     (batches([8, 1, 8]), 8, "growth.start=8")],
)  # fmt: skip
def test_batch_norm_of_one_row_is_refused_with_the_keys_before_the_folder(
    growth: Growth, max_micro: int, rows: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"{rows}.* micro-batches of one row.*model.norm=group") as refused:
        train(tmp_path, growth=growth, max_micro=max_micro, stages=every(samples=8))
    assert "launch.workers" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_batch_norm_over_positions_trains_on_one_row_and_so_do_other_norms(tmp_path: Path) -> None:
    positions = nn.Sequential(nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(12, 2))
    assert train(tmp_path, model=positions, growth=constant(1)).progress.step == 24
    assert train(tmp_path / "b", model=flat(nn.LayerNorm(5)), growth=constant(1)).progress.step == 24


def test_a_row_that_is_left_alone_in_an_update_is_told_as_well(tmp_path: Path) -> None:
    calls = list[int]()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(model.training)
        inputs = batch[0][:1] if sum(calls) == 2 else batch[0]
        return F.cross_entropy(model(inputs), batch[1][: len(inputs)])

    with pytest.raises(ConfigError, match=r"one row, and BatchNorm cannot train.*launch.workers"):
        train(tmp_path, loss)


def test_what_is_looked_at_changes_nothing_that_trains(tmp_path: Path) -> None:
    model = flat()
    list(model.children())[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = list[dict[str, Tensor]]()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training and not seen:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return cross_entropy(model, batch)

    train(tmp_path, loss, model=model, growth=constant(8), test=DATA, metrics=lambda *_: {"one": 1.0})
    assert seen[0].keys() == before.keys()
    assert all(torch.equal(seen[0][name], value) for name, value in before.items())
