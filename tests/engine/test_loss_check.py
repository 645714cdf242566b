"""A loss that is no mean over samples is refused before growth goes by its noise; one that cannot be told is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow import Controller, RunSpec, budget, exponential, fit, noise_scale_tracking
from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.engine.spec import DeepSpeed, Torch, check_suits
from distgrow.growth import Growth
from distgrow.growth.cabs import CABS
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.growth.progress_test import ProgressTest
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.run.folder import RunFolder
from distgrow.tasks.task import Task
from distgrow.training.loss_check import check_mean, is_mean, tried

GROWTH = NoiseScale(start=4, cap=16)


def data(rows: int = 20) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,)))


def task(loss: Callable[..., Any], rows: int = 20, model: nn.Module | None = None) -> Task:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    return Task(model=model or layers, loss=loss, train=data(rows))


def cross_entropy(model: nn.Module, batch: Any, **kind: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], **kind)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


REFUSED: dict[str, Callable[..., Any]] = {
    "sum": lambda model, batch: cross_entropy(model, batch, reduction="sum"),
    "root": lambda model, batch: cross_entropy(model, batch).sqrt(),
    "per class": lambda model, batch: cross_entropy(model, batch, weight=torch.tensor([1.0, 5.0, 0.2])),
    "maximum": lambda model, batch: cross_entropy(model, batch, reduction="none").max(),
    "contrastive": contrastive,
}
PASSED: dict[str, Callable[..., Any]] = {
    "mean": cross_entropy,
    "zero": lambda model, batch: 0.0 * cross_entropy(model, batch),
    "random": lambda model, batch: cross_entropy(model, (batch[0] + torch.randn_like(batch[0]), batch[1])),
    "not finite": lambda model, batch: cross_entropy(model, batch) / 0,
    "a vector, told later": lambda model, batch: cross_entropy(model, batch, reduction="none"),
    "a number, told later": lambda model, batch: float(cross_entropy(model, batch)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_mean_over_samples_is_refused_with_its_values(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"no mean over samples.*return the mean over the rows"):
        check_mean(task(REFUSED[kind]), GROWTH, seed=0)


@pytest.mark.parametrize("kind", PASSED)
def test_a_mean_passes_and_so_does_what_cannot_be_told(kind: str) -> None:
    assert check_mean(task(PASSED[kind]), GROWTH, seed=0) == 24


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
def test_of_a_small_data_set_all_rows_are_tried(rows: int) -> None:
    assert check_mean(task(cross_entropy, rows), GROWTH, seed=0) == 3 * rows
    with pytest.raises(ConfigError, match="no mean"):
        check_mean(task(REFUSED["sum"], rows), GROWTH, seed=0)


def test_of_one_sample_nothing_can_be_measured() -> None:
    with pytest.raises(ConfigError, match="the training set has 1; it needs at least 2"):
        check_mean(task(cross_entropy, 1), GROWTH, seed=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_pass_too(dtype: torch.dtype) -> None:
    check_mean(task(cross_entropy, model=nn.Linear(6, 3).to(dtype)), GROWTH, seed=0)


def test_it_leaves_no_trace() -> None:
    made = task(cross_entropy)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    random = torch.get_rng_state()
    check_mean(made, GROWTH, seed=0)
    assert made.model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters())


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(-10, 10)), min_size=2, max_size=4), st.floats(-1e-3, 1e-3))
def test_a_mean_is_told_by_its_parts_up_to_the_tolerance(parts: list[tuple[int, float]], off: float) -> None:
    rows = sum(count for count, _ in parts)
    mean = sum(count * loss for count, loss in parts) / rows
    scale = max(abs(mean), *(abs(loss) for _, loss in parts))
    if abs(abs(off) - 1e-4) < 1e-6 or scale < 1e-6:
        return
    assert is_mean(mean + off * scale, parts, 1e-4) == (abs(off) < 1e-4)


@pytest.mark.parametrize(
    ("growth", "asked"),
    [(GROWTH, 24), (NormThreshold(cap=16), 24), (ProgressTest(cap=16), 24), (exponential(4, 2, 16), 0)],
)
def test_it_is_tried_where_growth_goes_by_it_and_no_run_has_begun(growth: Growth, asked: int, tmp_path: Path) -> None:
    folder, made = RunFolder(tmp_path / "run"), task(cross_entropy)
    control = Controller(growth=growth, budget=budget(samples=100), epoch=len(made.train), max_micro=2)
    assert tried(made, control, folder, World()) == asked
    folder.create({})
    assert tried(made, control, folder, World()) == 0


@pytest.mark.parametrize("evaluations", [20, 24])
def test_a_budget_that_the_trial_alone_spends_is_refused(evaluations: int, tmp_path: Path) -> None:
    made = task(cross_entropy, 50)
    with pytest.raises(ConfigError, match=f"budget.sfo={evaluations}: .* takes 24 gradient evaluations; raise it"):
        fit(
            made.model,
            made.loss,
            made.train,
            growth=noise_scale_tracking(4, 16),
            budget=budget(sfo=evaluations),
            run=RunSpec(dir=str(tmp_path / "run")),
        )
    assert not (tmp_path / "run").exists()


def test_its_evaluations_are_the_first_probes_of_the_run(tmp_path: Path) -> None:
    made = task(cross_entropy, 50)
    run = RunSpec(dir=str(tmp_path / "run"))
    growth = noise_scale_tracking(4, 16)
    result = fit(made.model, made.loss, made.train, growth=growth, budget=budget(samples=100), run=run)
    assert result.progress.ledger.probe == 24
    assert result.progress.ledger.applied == 100


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    made, run = task(REFUSED["sum"], 50), RunSpec(dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="no mean"):
        fit(made.model, made.loss, made.train, growth=GROWTH, budget=budget(samples=100), run=run)
    assert not (tmp_path / "run" / "config.yaml").exists()
    fit(made.model, made.loss, made.train, growth=exponential(4, 2, 16), budget=budget(samples=100), run=run)


# ── growth, optimizer and engine ────────────────────────────────────────────────────────────────────────────────


class Blind(Torch):
    """An engine that cannot hold gradients against updates."""

    tests_progress = False


def test_growth_is_refused_what_the_updates_do_not_show(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"growth.kind=progress .* engine.kind=torch cannot"):
        check_suits(ProgressTest(cap=16), SGD(), Blind())
    for engine in (Torch(), DeepSpeed()):
        check_suits(ProgressTest(cap=16), AdamW(), engine)
    for optimizer in (SGD(momentum=0.5), AdamW()):
        with pytest.raises(ConfigError, match="holds for SGD without momentum"):
            check_suits(CABS(cap=16), optimizer, Torch())
        made, run = task(cross_entropy, 50), RunSpec(dir=str(tmp_path / "run"))
        with pytest.raises(ConfigError, match="holds for SGD without momentum"):
            fit(made.model, made.loss, made.train, growth=CABS(cap=16), budget=budget(samples=99), optimizer=optimizer,
                run=run)  # fmt: skip
