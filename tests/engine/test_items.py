"""A loss that is a mean over items: an update is the exact mean over the items of its batch, however it is cut."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow import RunSpec, budget, constant_lr, fit, steps
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.errors import ConfigError, Diverged
from distgrow.core.plan import Plan, split
from distgrow.core.probe_schedule import Probing
from distgrow.core.progress import Outcome
from distgrow.distributed.world import World
from distgrow.engine.probes import Probe
from distgrow.engine.spec import Torch
from distgrow.engine.torch import TorchEngine
from distgrow.growth.constant import Constant
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.report.runs import read
from distgrow.report.sections import sentence
from distgrow.tasks.task import Task
from distgrow.training.loss_check import check_mean
from distgrow.training.spec import Evaluation

ROWS, LENGTH, WORDS = 24, 7, 11


def labels_of(rows: int, *, none: tuple[int, ...] = ()) -> Tensor:
    """Labels of rows that count 1 to LENGTH of them, and none in the rows `none`."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, WORDS, (rows, LENGTH), generator=generator)
    for k in range(rows):
        labels[k, 0 if k in none else 1 + k * 5 % LENGTH :] = -100
    return labels


class Texts(torch.utils.data.Dataset[Any]):
    """Rows of tokens and labels."""

    def __init__(self, labels: Tensor) -> None:
        self.tokens = torch.randint(0, WORDS, labels.shape, generator=torch.Generator().manual_seed(4))
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.labels[index]


def model_of(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)).to(dtype)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)


def items(batch: Any) -> Tensor:
    return batch[1].ne(-100).sum()


def cut(data: Texts, plan: Plan) -> list[tuple[Tensor, Tensor]]:
    return [(data.tokens[r.start : r.stop], data.labels[r.start : r.stop]) for r in plan.rows(0, 0)]


def updated(data: Texts, micro: int, **settings: Any) -> tuple[nn.Module, Outcome]:
    """Return the model after an update of all rows in micro-batches of at most `micro` rows, and the outcome."""
    model = model_of()
    most, accum = split(len(data), 1, micro)
    plan = Plan(batch=len(data), world=1, micro=most, accum=accum, lr=0.1, stage=0, window=9)
    options = {"optimizer": SGD(), **settings}
    engine = TorchEngine(model, loss, spec=Torch(precision="float64"), items=items, **options)
    return model, engine.update(plan, cut(data, plan))


def by_hand(data: Texts, lr: float, clip: float = math.inf) -> tuple[nn.Module, float, float]:
    """Return the model after a step of SGD on the mean over all items in one pass, the loss and the norm."""
    model = model_of()
    value = loss(model, (data.tokens, data.labels))
    gradients = torch.autograd.grad(value, list(model.parameters()))
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= lr * min(1.0, clip / (norm + 1e-6)) * gradient
    return model, float(value.detach()), norm


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max().detach()) for a, b in pairs)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("micro", [1, 2, 5, 24])
def test_an_update_is_the_mean_over_the_items_of_the_batch_however_it_is_cut(micro: int, clip: float | None) -> None:
    data = Texts(labels_of(ROWS, none=(2, 3, 17)))
    model, outcome = updated(data, micro, optimizer=SGD(clip=clip))
    expected, value, norm = by_hand(data, 0.1, math.inf if clip is None else clip)
    assert apart(model, expected) < 1e-14
    assert outcome.loss == pytest.approx(value, rel=1e-13)
    assert outcome.grad_norm == pytest.approx(norm, rel=1e-13)


def test_rows_weigh_alike_without_items() -> None:
    """Hold the difference that items make against what a mean of means gives."""
    data = Texts(labels_of(ROWS))
    model = model_of()
    plan = Plan(batch=ROWS, world=1, micro=1, accum=ROWS, lr=0.1, stage=0)
    outcome = TorchEngine(model, loss, spec=Torch(precision="float64"), optimizer=SGD()).update(plan, cut(data, plan))
    engine_loss = [loss(model_of(), (data.tokens[k : k + 1], data.labels[k : k + 1])).item() for k in range(ROWS)]
    assert outcome.loss == pytest.approx(sum(engine_loss) / ROWS, rel=1e-12)
    assert abs(outcome.loss - by_hand(data, 0.1)[1]) > 1e-3


def test_noise_weighs_parts_by_their_items() -> None:
    data = Texts(labels_of(ROWS, none=(2, 3)))
    _, outcome = updated(data, 2)
    parts = [(int(items(part)), part) for part in zip(data.tokens.split(2), data.labels.split(2), strict=True)]
    total, squares = sum(count for count, _ in parts), 0.0
    for count, part in parts:
        if count:
            model = model_of()
            gradients = torch.autograd.grad(loss(model, part), list(model.parameters()))
            squares += count / total * sum(float(g.square().sum()) for g in gradients)
    assert outcome.measured.parts_sq == pytest.approx(squares, rel=1e-12)
    assert outcome.measured.batch_sq == pytest.approx(by_hand(data, 0.1)[2] ** 2, rel=1e-12)
    assert outcome.measured.parts == sum(count > 0 for count, _ in parts) == 11


@pytest.mark.parametrize("micro", [2, 24])
def test_a_batch_without_items_moves_nothing(micro: int) -> None:
    model, outcome = updated(Texts(labels_of(ROWS, none=tuple(range(ROWS)))), micro, optimizer=AdamW())
    assert not outcome.applied
    assert not outcome.out_of_memory
    assert apart(model, model_of()) == 0


@pytest.mark.parametrize("count", [math.nan, -1, math.inf, "3", None, torch.ones(2)])
def test_what_counts_nothing_is_refused_by_its_value(count: Any) -> None:
    engine = TorchEngine(model_of(), loss, items=lambda batch: count, spec=Torch(precision="float64"))
    plan = Plan(batch=ROWS, world=1, micro=ROWS, accum=1, lr=0.1, stage=0)
    with pytest.raises(ConfigError, match="items returned"):
        engine.update(plan, cut(Texts(labels_of(ROWS)), plan))


def task(value: Any, counted: Any = items, *, rows: int = ROWS, none: tuple[int, ...] = ()) -> Task:
    return Task(model=model_of(), loss=value, train=Texts(labels_of(rows, none=none)), items=counted)


def total(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")


def of_rows(model: nn.Module, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").sum(1)
    return (losses / batch[1].ne(-100).sum(1)).mean()


@pytest.mark.parametrize(("value", "counted"), [(total, items), (of_rows, items), (loss, len), (total, len)])
def test_a_loss_that_is_no_mean_over_its_items_is_refused(value: Any, counted: Any) -> None:
    with pytest.raises(ConfigError, match="the loss is no mean over items"):
        check_mean(task(value, counted), Constant(start=4), 0)


def test_a_mean_over_its_items_passes_and_without_items_the_refusal_names_them() -> None:
    check_mean(task(loss), Constant(start=4), 0)
    check_mean(task(loss, none=tuple(range(0, ROWS, 2))), Constant(start=4), 0)
    with pytest.raises(ConfigError, match=r"no mean over samples.*items=lambda batch"):
        check_mean(task(loss, None), Constant(start=4), 0)


def test_a_run_by_items_is_the_same_for_every_micro_batch_and_evaluates_over_items(tmp_path: Path) -> None:
    data, found = Texts(labels_of(ROWS, none=(2, 3))), []
    for micro in (1, 5, 24):
        model = model_of()
        result = fit(
            model, loss, data, items=items, test=data, growth=steps([4, 12]), budget=budget(epochs=2),
            lr=constant_lr(0.01), optimizer=AdamW(), engine=Torch(precision="float64", max_micro=micro),
            run=RunSpec(dir=str(tmp_path / str(micro))),
        )  # fmt: skip
        assert result.metrics["loss"] == pytest.approx(
            float(loss(model, (data.tokens, data.labels)).detach()), rel=1e-12
        )
        found.append(model)
    assert apart(found[0], found[1]) < 1e-12
    assert apart(found[0], found[2]) < 1e-12


def test_batches_without_items_are_skipped_and_counted_until_there_are_too_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Texts(labels_of(ROWS, none=tuple(range(ROWS))))
    settings: dict[str, Any] = {"growth": steps([4]), "budget": budget(epochs=2), "items": items}
    with pytest.raises(Diverged, match="items"):
        fit(model_of(), loss, data, run=RunSpec(dir=str(tmp_path), max_skips=3), **settings)
    events = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"skip"' in line]
    assert len(events) == 3
    assert capsys.readouterr().err.count("the batch counted no items; 4 samples skipped") == 3
    assert '"sfo_skipped": 12' in events[-1] or '"sfo_skipped":12' in events[-1]


def test_an_exact_probe_is_the_gradient_of_the_mean_over_all_items(tmp_path: Path) -> None:
    data, model = Texts(labels_of(ROWS, none=(0, 1, 2, 3))), model_of()
    engine = TorchEngine(model, loss, spec=Torch(precision="float64"), items=items)
    batches = [((data.tokens[k : k + 4], data.labels[k : k + 4]), 4) for k in range(0, ROWS, 4)]
    probe = Probe(engine, World(), lambda: batches, items)
    value, gradient = probe.gradient()
    _, expected, norm = by_hand(data, 0.1)
    assert (value, probe.norm(gradient)) == pytest.approx((expected, norm), rel=1e-12)
    assert engine.evaluations == ROWS
    curved = RunSpec(dir=str(tmp_path), probe=Probing(every_epochs=1, curvature=True))
    with pytest.raises(ConfigError, match=r"run\.probe\.curvature"):
        fit(model, loss, data, items=items, growth=steps([4]), budget=budget(epochs=1), run=curved)


def test_a_budget_of_tokens_that_nobody_counts_is_refused_instead_of_never_ending(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget\.tokens=100 would never be spent.*tokens\(batch\)"):
        fit(
            model_of(), loss, Texts(labels_of(ROWS)), items=items, tokens=lambda batch: 0, growth=steps([4]),
            budget=budget(tokens=100, samples=80), run=RunSpec(dir=str(tmp_path)),
        )  # fmt: skip


def texts(folder: Path, name: str, **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    data = Texts(labels_of(ROWS))
    given: dict[str, Any] = {"growth": steps([4]), "lr": constant_lr(0.01), "items": items, **settings}
    run = RunSpec(dir=str(folder / name), **given.pop("run", {}))
    result = fit(model_of(dtype=torch.float32), loss, data, run=run, **given)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return result, lines


def test_tokens_are_counted_over_the_run_and_end_it(tmp_path: Path) -> None:
    total = int(items((None, labels_of(ROWS))))
    result, lines = texts(tmp_path, "epochs", budget=budget(epochs=2))
    steps_made = [line for line in lines if line["event"] == "step"]
    assert result.progress.tokens == steps_made[-1]["tokens"] == 2 * total
    assert f" {2 * total:,} tokens, " in sentence(*read([str(tmp_path / "epochs")]))
    first = steps_made[0]
    assert first["tokens_per_s"] == pytest.approx(first["samples_per_s"] * first["tokens"] / 4)
    result, lines = texts(tmp_path, "tokens", budget=budget(tokens=total + 1, samples=ROWS + 4))
    tokens = [line["tokens"] for line in lines if line["event"] == "step"]
    assert tokens[-2] <= total < tokens[-1] == result.progress.tokens


def test_tokens_of_every_sample_are_a_unit_of_the_whole_run(tmp_path: Path) -> None:
    intervals = {"eval": {"every_tokens": 56}, "checkpoint": {"every_tokens": 84}}
    result, lines = texts(
        tmp_path, "run", tokens=LENGTH, budget=budget(tokens=20 * LENGTH), test=Texts(labels_of(4)),
        run={"eval": Evaluation(**intervals["eval"]), "checkpoint": Checkpointing(**intervals["checkpoint"])},
    )  # fmt: skip
    assert (result.progress.samples, result.progress.tokens) == (20, 20 * LENGTH)
    places = {kind: [line["samples"] for line in lines if line["event"] == kind] for kind in ("eval", "checkpoint")}
    assert places == {"eval": [8, 16, 20], "checkpoint": [0, 12, 20]}
    with pytest.raises(ConfigError, match=r"budget\.tokens=100"):
        texts(tmp_path, "unknown", budget=budget(tokens=100))


def dropped(model: nn.Module, batch: Any) -> Tensor:
    return loss(lambda tokens: F.dropout(model(tokens), 0.2, training=True), batch)  # pyright: ignore[reportArgumentType]


def dropped_rows(model: nn.Module, batch: Any) -> Tensor:
    return of_rows(lambda tokens: F.dropout(model(tokens), 0.2, training=True), batch)  # pyright: ignore[reportArgumentType]


def test_a_mean_over_tokens_is_seen_beside_random_numbers() -> None:
    growth = Constant(start=4)
    check_mean(task(dropped), growth, 0)
    check_mean(task(dropped_rows, None), growth, 0)
    with pytest.raises(ConfigError, match=r"no mean over samples.*same random numbers.*items="):
        check_mean(task(dropped, None), growth, 0)
    with pytest.raises(ConfigError, match="no mean over items"):
        check_mean(task(dropped_rows), growth, 0)


class Late(nn.Module):
    """A loss that is a sum over rows once it has been trained on for a while: a schedule that has gone wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        self.updates += model.training
        return loss(model, batch) * (len(batch[0]) if self.updates > 8 else 1)


def test_the_loss_is_checked_again_at_the_first_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"growth": steps([6]), "budget": budget(epochs=4), "items": items}
    data = Texts(labels_of(ROWS))
    with pytest.raises(ConfigError, match="no mean over items: after some updates"):
        fit(
            model_of(dtype=torch.float32),
            Late(),
            data,
            run=RunSpec(dir=str(tmp_path), eval=Evaluation(every_epochs=3)),
            **settings,
        )
    assert list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "counted", [{"items": None}, {"tokens": lambda batch: 2.5}, {"items": lambda batch: items(batch) / 2}]
)
def test_a_budget_of_tokens_that_nobody_counts_in_whole_numbers_is_refused(counted: Any, tmp_path: Path) -> None:
    mean = of_rows if counted.get("items", items) is None else loss
    given: dict[str, Any] = {"growth": steps([4]), "items": items, **counted}
    run = RunSpec(dir=str(tmp_path))
    with pytest.raises(ConfigError, match="tokens"):
        fit(model_of(), mean, Texts(labels_of(ROWS)), budget=budget(tokens=999, samples=99), run=run, **given)
