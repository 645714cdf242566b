"""Outcomes that are told one update later: against runs that wait, and no waiting in between."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import data, loss, network
from torch import Tensor, nn
from waiting import check_updates_wait_for_nothing

from distgrow import (
    SGD,
    AdamW,
    Extrapolate,
    Muon,
    RunSpec,
    Torch,
    auto,
    budget,
    constant,
    ema,
    every,
    exponential,
    fit,
    load_weights,
    noise_scale,
    progress_test,
    sparsity,
    sqrt_lr,
)
from distgrow.core.errors import ConfigError
from distgrow.core.noise_stats import Measuring, Noise
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, PolicyState, Progress
from distgrow.engine.ahead import AheadEngine
from distgrow.growth.base import Measure
from distgrow.growth.constant import Constant
from distgrow.optim.lamb import LAMB
from distgrow.training.spec import Evaluation

ROWS = data(96)
OPTIMIZERS: dict[str, Any] = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9, nesterov=True, weight_decay=0.01, clip=0.3),
    "adamw": AdamW(weight_decay=0.1),
    "muon": Muon(clip=0.5),
}


class Norms(nn.Module):
    """A network with buffers, which a batch that is not finite would spoil."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


def run(folder: Path, *, ahead: int, delay: int = 0, model: nn.Module | None = None, **more: Any) -> tuple[Any, Any]:
    model = model or Norms()
    settings: dict[str, Any] = {
        "growth": exponential(4, 2, 16), "stages": every(samples=96), "lr": sqrt_lr(0.02), "optimizer": SGD(),
        "budget": budget(samples=400), "run": RunSpec(dir=str(folder)), **more,
    }  # fmt: skip
    engine = Torch(precision="float64", max_micro=8, ahead=ahead, delay=delay)  # pyright: ignore[reportArgumentType]
    return model, fit(model, settings.pop("loss", loss), settings.pop("train", ROWS), engine=engine, **settings)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of updates, without time and noise: which updates are measured follows from their number."""
    timed = {"time_s", "samples_per_s", "tokens_per_s", "grad_sq", "noise_trace", "noise_scale"}
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in found
        if line["event"] in ("step", "skip")
    ]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def spoiled(*at: int) -> list[Any]:
    """Return the rows, of which some are not finite."""
    return [(row * float("nan") if k in at else row, label) for k, (row, label) in enumerate(ROWS)]


@pytest.mark.parametrize("rows", [ROWS, spoiled(50), spoiled(3, 4, 5)], ids=["finite", "one row", "three rows"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_planned_run_is_the_same_to_the_bit_line_by_line_whether_the_host_waits_or_not(
    optimizer: str, rows: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"optimizer": OPTIMIZERS[optimizer], "train": rows}
    if rows is ROWS:  # else the update after a skipped one takes it for applied, and the average's weights differ
        settings["average"] = ema(samples=60)
    waiting, known = run(tmp_path / "0", ahead=0, **settings)
    ahead, told = run(tmp_path / "1", ahead=1, **settings)
    assert same(waiting, ahead)
    assert replace(known.progress, noise=Noise()) == replace(told.progress, noise=Noise())
    assert lines(tmp_path / "0") == lines(tmp_path / "1")
    assert (told.progress.ledger.skipped > 0) is (rows is not ROWS)
    if rows is ROWS:
        for number, model in enumerate((waiting, ahead)):
            load_weights(model, tmp_path / f"{number}", average=True)
        assert same(waiting, ahead)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_items_and_tokens_are_counted_as_when_the_host_waits(optimizer: str, tmp_path: Path) -> None:
    def positive(model: nn.Module, batch: Any) -> Tensor:
        labels = batch[1].masked_fill(batch[1] == 0, -100)
        return nn.functional.cross_entropy(model(batch[0]), labels)

    more: dict[str, Any] = {"items": lambda batch: (batch[1] > 0).sum(), "loss": positive}
    found = [run(tmp_path / f"{k}", ahead=k, optimizer=OPTIMIZERS[optimizer], **more, model=network()) for k in (0, 1)]
    (one, known), (other, told) = found
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert known.progress.tokens == told.progress.tokens > 0
    assert known.progress.ledger == told.progress.ledger


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "muon"])
def test_with_a_delay_of_one_it_is_the_delayed_run_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer": OPTIMIZERS[optimizer], "average": ema(samples=60), "lr": sqrt_lr(0.002)}
    one, known = run(tmp_path / "0", ahead=0, delay=1, **settings)
    other, told = run(tmp_path / "1", ahead=1, delay=1, **settings)
    assert same(one, other)
    assert replace(known.progress, noise=Noise()) == replace(told.progress, noise=Noise())
    assert lines(tmp_path / "0") == lines(tmp_path / "1")


def test_under_a_delay_a_gradient_that_is_not_finite_is_left_out_where_it_would_have_been_applied(
    tmp_path: Path,
) -> None:
    model, result = run(tmp_path, ahead=1, delay=1, train=spoiled(50), model=network())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    ledger = result.progress.ledger
    assert (ledger.applied, ledger.skipped) == (
        400,
        sum(line["batch"] for line in lines(tmp_path) if line["event"] == "skip"),
    )
    assert ledger.skipped > 0


class Hearing(Constant):
    """Takes a learning rate of base/(1 + n) once n updates have told what they gave."""

    @property
    def needs(self) -> frozenset[Measure]:
        return frozenset({Measure.LOSS})

    def multiplier(self, lr: Any, progress: Progress, batch: int, span: Any) -> float:
        return 1 / (1 + progress.policy.get("heard", 0))

    def after(self, progress: Progress, plan: Plan, outcome: Outcome) -> PolicyState:
        assert outcome.loss > 0
        return {"heard": progress.policy.get("heard", 0) + 1}


@pytest.mark.parametrize(("ahead", "delay"), [(0, 0), (1, 0), (1, 1)])
def test_a_decision_sees_what_updates_up_to_the_last_but_one_gave(ahead: int, delay: int, tmp_path: Path) -> None:
    run(tmp_path, ahead=ahead, delay=delay, growth=Hearing(start=8), stages=None, lr=sqrt_lr(0.5), model=network())
    rates = [line["lr"] for line in lines(tmp_path)]
    assert rates == pytest.approx([0.5 / (1 + max(0, update - ahead)) for update in range(50)])


@pytest.mark.parametrize(
    ("optimizer", "plan"),
    [
        ("sgd", {}), ("momentum", {"window": 20}), ("adamw", {"window": 20, "product": True, "average": 0.1}),
        ("momentum", {"window": 20, "product": True}), ("muon", {"window": 20, "average": 0.1}),
    ],
)  # fmt: skip
def test_no_update_reads_a_number_of_the_device_but_what_the_one_before_it_left(
    optimizer: str, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = AheadEngine(Norms(), loss, spec=Torch(precision="float64", ahead=1), optimizer=OPTIMIZERS[optimizer])
    batches = [(torch.stack([row for row, _ in ROWS[k : k + 8]]), torch.tensor([k % 2] * 8)) for k in range(0, 80, 8)]
    given = Plan(batch=16, world=1, micro=8, accum=2, lr=0.01, stage=0, **plan)
    check_updates_wait_for_nothing(made, given, batches, monkeypatch)


def test_memory_that_is_short_is_found_at_once_and_the_batch_tried_again(tmp_path: Path) -> None:
    def tight(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) > 4 and torch.is_grad_enabled() and model.training:
            raise MemoryError("no more than 4 rows")
        return loss(model, batch)

    (waits, known), (goes, told) = (
        run(tmp_path / f"{ahead}", ahead=ahead, loss=tight, model=network()) for ahead in (0, 1)
    )
    assert same(waits, goes)
    assert known.progress.ledger == told.progress.ledger
    assert told.progress.ledger.discarded > 0


def test_evaluations_do_not_change_what_is_told(tmp_path: Path) -> None:
    spec = RunSpec(dir=str(tmp_path / "evaluated"), eval=Evaluation(every_steps=3))
    one, _ = run(tmp_path / "plain", ahead=1, growth=auto(start=4), stages=None)
    other, _ = run(tmp_path / "evaluated", ahead=1, growth=auto(start=4), stages=None, test=ROWS[:20], run=spec)
    assert same(one, other)
    assert lines(tmp_path / "plain") == lines(tmp_path / "evaluated")


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"optimizer": LAMB()}, r"engine.ahead=1.*optimizer.kind=lamb.*engine.ahead=0"),
        (
            {"growth": progress_test(start=4, cap=32), "stages": None, "optimizer": Muon()},
            r"growth.kind=progress_test.*muon.*engine.ahead=1",
        ),
        (
            {"growth": noise_scale(start=4, cap=32, norm="preconditioned"), "stages": None, "optimizer": AdamW()},
            r"growth.norm=preconditioned.*engine.ahead=1",
        ),
        ({"extrapolate": Extrapolate(kind="past", rate=0.1)}, r"extrapolate.*engine.ahead=1"),
        ({"sparsity": sparsity(0.5)}, r"sparsity.*engine.ahead=1"),
        (
            {"budget": budget(tokens=1000, samples=100), "tokens": lambda batch: len(batch[0])},
            r"budget.tokens=1000.*engine.ahead=1",
        ),
    ],
)  # fmt: skip
def test_what_needs_outcomes_at_once_is_refused(settings: dict[str, Any], keys: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=keys):
        run(tmp_path, ahead=1, **settings)


def test_noise_of_parameters_and_longer_delays_are_refused(tmp_path: Path) -> None:
    spec = RunSpec(dir=str(tmp_path), noise=Measuring(by_parameter=True))
    with pytest.raises(ConfigError, match=r"run.noise.by_parameter=true.*engine.ahead=1"):
        run(tmp_path, ahead=1, run=spec)
    with pytest.raises(ConfigError, match=r"ahead=1.*delay=2"):
        Torch(ahead=1, delay=2)
    with pytest.raises(ConfigError, match=r"ahead=1.*find_unused"):
        Torch(ahead=1, delay=1, find_unused=True)


def test_a_run_of_one_update_tells_what_it_gave(tmp_path: Path) -> None:
    _, result = run(tmp_path, ahead=1, growth=constant(8), stages=None, budget=budget(steps=1))
    assert result.progress.step == 1
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert lines(tmp_path)[0]["loss"] > 0
