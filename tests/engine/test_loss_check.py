"""A loss that is no mean over samples is refused before training; one that cannot be told is not."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow import Controller, RunSpec, budget, exponential, fit
from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.engine.ability import Can
from distgrow.engine.compatible import check_compatible
from distgrow.engine.mean_losses import is_mean
from distgrow.engine.spec import DeepSpeed, Torch
from distgrow.growth import Growth
from distgrow.growth.cabs import CABS
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.growth.progress_test import ProgressTest
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.run.folder import RunFolder
from distgrow.tasks.architectures import GPT, MLP, Images, ResNet, Softmax, Tokens
from distgrow.tasks.task import Task
from distgrow.training.loss_check import check_loss, check_mean

GROWTH, SCHEDULE = NoiseScale(start=4, cap=16), exponential(4, 2, 16)


def data(rows: int = 20) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,)))


def task(loss: Callable[..., Any], rows: int = 20, model: nn.Module | None = None) -> Task:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    return Task(model=model or layers, loss=loss, train=data(rows))


def cross_entropy(model: nn.Module, batch: Any, **kind: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], **kind)


def mixed(model: nn.Module, batch: Any) -> Tensor:
    """Mixup: no mean over rows, yet its mean over seeds hardly depends on how many there are."""
    share, other = float(np.random.beta(1, 1)), torch.randperm(len(batch[0]))
    logits = model(share * batch[0] + (1 - share) * batch[0][other])
    return share * F.cross_entropy(logits, batch[1]) + (1 - share) * F.cross_entropy(logits, batch[1][other])


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


REFUSED: dict[str, Callable[..., Any]] = {
    "sum": lambda model, batch: cross_entropy(model, batch, reduction="sum"),
    "root": lambda model, batch: cross_entropy(model, batch).sqrt(),
    "per class": lambda model, batch: cross_entropy(model, batch, weight=torch.tensor([1.0, 5.0, 0.2])),
    "maximum": lambda model, batch: cross_entropy(model, batch, reduction="none").max(),
    "contrastive": contrastive,
    "sum of random terms": lambda model, batch: cross_entropy(
        model, (batch[0] + torch.randn_like(batch[0]), batch[1]), reduction="sum"
    ),
}
PASSED: dict[str, Callable[..., Any]] = {
    "mean": cross_entropy,
    "zero": lambda model, batch: 0.0 * cross_entropy(model, batch),
    "penalty": lambda model, batch: cross_entropy(model, batch) + sum(p.square().sum() for p in model.parameters()),
    "random": lambda model, batch: cross_entropy(model, (batch[0] + torch.randn_like(batch[0]), batch[1])),
    "mixed": mixed,
    "not finite": lambda model, batch: cross_entropy(model, batch) / 0,
    "training mode alone": lambda model, batch: cross_entropy(model, batch) if model.training else batch.loss,
    "a vector, told later": lambda model, batch: cross_entropy(model, batch, reduction="none"),
    "a number, told later": lambda model, batch: float(cross_entropy(model, batch)),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_what_is_no_mean_over_samples_is_refused_with_its_values(kind: str, most: int) -> None:
    with pytest.raises(ConfigError, match=r"no mean over samples.*return the mean over the rows"):
        check_mean(task(REFUSED[kind]), SCHEDULE, seed=0, most=most)


@pytest.mark.parametrize("kind", PASSED)
def test_a_mean_passes_and_so_does_what_cannot_be_told(kind: str) -> None:
    check_mean(task(PASSED[kind]), SCHEDULE, seed=0)


class Ragged(torch.utils.data.Dataset[Tensor]):
    """Rows of 2 to 9 tokens."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(1, 30, (2 + index * 7 % 8,), generator=torch.Generator().manual_seed(index))


class Zero(nn.Module):
    """A language model whose head is zero at first, so that all tokens have the same loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.tokens(tokens))


def per_token(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, batch[:, 1:], ignore_index=0, reduction="none")


def of_rows(model: nn.Module, batch: Tensor) -> Tensor:
    return (per_token(model, batch).sum(1) / batch[:, 1:].ne(0).sum(1)).mean()


def of_tokens(model: nn.Module, batch: Tensor) -> Tensor:
    return per_token(model, batch).sum() / batch[:, 1:].ne(0).sum()


def of_weights(model: nn.Module, batch: Tensor) -> Tensor:
    weights = 1.0 + batch[:, 0]
    return (weights * per_token(model, batch).sum(1)).sum() / weights.sum()


@pytest.mark.parametrize("loss", [of_tokens, of_weights, lambda *of: per_token(*of).sum()])
def test_a_mean_over_tokens_or_weights_is_seen_where_all_losses_are_equal(loss: Callable[..., Any]) -> None:
    def pad(rows: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def made(loss: Callable[..., Any]) -> Task:
        return Task(model=Zero(), loss=loss, train=Ragged(), collate=pad)

    check_mean(made(of_rows), SCHEDULE, seed=0)
    with pytest.raises(ConfigError, match="the loss is no mean over samples"):
        check_mean(made(loss), SCHEDULE, seed=0)


IMAGES, TOKENS = Images(channels=3, height=8, width=8, classes=4), Tokens(length=6, vocabulary=9)
MODELS: dict[str, tuple[Any, Any]] = {
    "softmax": (Softmax(), IMAGES),
    "mlp": (MLP(), IMAGES),
    "group norm": (ResNet(norm="group"), IMAGES),
    "batch norm": (ResNet(norm="batch"), IMAGES),
    "deep": (ResNet(kind="resnet20", norm="batch"), IMAGES),
    "gpt": (GPT(width=16, dropout=0.5), TOKENS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_the_mean_of_every_built_in_model_passes_in_every_precision(kind: str, dtype: torch.dtype) -> None:
    spec, inputs = MODELS[kind]
    draw = torch.Generator().manual_seed(0)
    if inputs is IMAGES:
        rows = torch.utils.data.TensorDataset(
            torch.randn(32, 3, 8, 8, generator=draw), torch.randint(4, (32,), generator=draw)
        )
    else:
        windows = torch.randint(9, (32, 7), generator=draw)
        rows = torch.utils.data.TensorDataset(windows[:, :-1], windows[:, 1:])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    model = spec.build(inputs).to(dtype)
    check_mean(Task(model=model, loss=loss, train=rows), SCHEDULE, seed=0)
    with pytest.raises(ConfigError, match="it is their sum"):
        total = Task(model=model, loss=lambda *of: loss(*of) * len(of[1][1]), train=rows)
        check_mean(total, SCHEDULE, seed=0)


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
def test_of_a_small_data_set_all_rows_are_tried(rows: int) -> None:
    check_mean(task(cross_entropy, rows), SCHEDULE, seed=0)
    with pytest.raises(ConfigError, match="no mean"):
        check_mean(task(REFUSED["sum"], rows), SCHEDULE, seed=0)


def test_of_one_sample_nothing_can_be_measured() -> None:
    with pytest.raises(ConfigError, match="the training set has 1; it needs at least 2"):
        check_mean(task(cross_entropy, 1), GROWTH, seed=0)
    check_mean(task(cross_entropy, 1), SCHEDULE, seed=0)


def test_it_leaves_no_trace() -> None:
    made = task(cross_entropy)
    made.model[1].eval()  # pyright: ignore[reportIndexIssue]
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    check_mean(made, GROWTH, seed=0)
    assert [module.training for module in made.model.children()] == [True, False, True, True]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters())


class Opened(torch.utils.data.Dataset[Any]):
    """Rows of a file that may be opened in a loader process alone."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None, "opened in the training process"
        return torch.full((6,), float(index)), index % 3


def test_a_run_with_loader_processes_reads_no_row_in_its_own() -> None:
    torch.manual_seed(0)
    made = Task(model=nn.Linear(6, 3), loss=REFUSED["sum"], train=Opened())
    with pytest.raises(ConfigError, match="no mean"):
        check_mean(made, SCHEDULE, seed=0, workers=1)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(-10, 10)), min_size=2, max_size=4), st.floats(-1e-3, 1e-3))
def test_a_mean_is_told_by_its_parts_up_to_the_tolerance(parts: list[tuple[int, float]], off: float) -> None:
    rows = sum(count for count, _ in parts)
    mean = sum(count * loss for count, loss in parts) / rows
    scale = max(abs(mean), *(abs(loss) for _, loss in parts))
    if abs(abs(off) - 1e-4) < 1e-6 or scale < 1e-6:
        return
    assert is_mean(mean + off * scale, parts, 1e-4) == (abs(off) < 1e-4)


@pytest.mark.parametrize("growth", [GROWTH, NormThreshold(cap=16), ProgressTest(cap=16), SCHEDULE])
def test_it_is_made_under_every_growth_until_a_run_has_begun(growth: Growth, tmp_path: Path) -> None:
    folder, made = RunFolder(tmp_path / "run"), task(REFUSED["sum"])
    control = Controller(growth=growth, budget=budget(samples=100), epoch=len(made.train), max_micro=2)
    with pytest.raises(ConfigError, match="no mean"):
        check_loss(made, control, folder, World())
    folder.create({})
    check_loss(made, control, folder, World())


@pytest.mark.parametrize("growth", [GROWTH, SCHEDULE])
def test_the_ledger_counts_nothing_for_it(growth: Growth, tmp_path: Path) -> None:
    made, run = task(cross_entropy, 50), RunSpec(dir=str(tmp_path / "run"))
    result = fit(made.model, made.loss, made.train, growth=growth, budget=budget(samples=100), run=run)
    assert (result.progress.ledger.probe, result.progress.ledger.applied) == (0, 100)


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    made, run = task(REFUSED["sum"], 50), RunSpec(dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="no mean"):
        fit(made.model, made.loss, made.train, growth=GROWTH, budget=budget(samples=100), run=run)
    assert not (tmp_path / "run" / "config.yaml").exists()


# ── growth, optimizer and engine ────────────────────────────────────────────────────────────────────────────────


class Blind(Torch):
    """An engine that cannot hold gradients against updates."""

    can = Can.PRUNE


def test_growth_is_refused_what_the_updates_do_not_show(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"growth.kind=progress_test .* engine.kind=torch cannot"):
        check_compatible(ProgressTest(cap=16), SGD(), Blind())
    for engine in (Torch(), DeepSpeed()):
        check_compatible(ProgressTest(cap=16), AdamW(), engine)
    for optimizer in (SGD(momentum=0.5), AdamW()):
        with pytest.raises(ConfigError, match="holds for SGD without momentum"):
            check_compatible(CABS(cap=16), optimizer, Torch())
        made, run = task(cross_entropy, 50), RunSpec(dir=str(tmp_path / "run"))
        with pytest.raises(ConfigError, match="holds for SGD without momentum"):
            fit(made.model, made.loss, made.train, growth=CABS(cap=16), budget=budget(samples=99), optimizer=optimizer,
                run=run)  # fmt: skip
