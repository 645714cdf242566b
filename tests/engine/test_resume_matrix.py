"""Whatever a run is made of, a resumed one is the run that was never stopped: parameters, average, ledger, events."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgrow import (
    CLARS,
    SGD,
    AdamW,
    AtGrowth,
    EarlyStopping,
    Extrapolate,
    Hook,
    Mixture,
    Muon,
    ParameterGroup,
    RunSpec,
    Torch,
    auto,
    budget,
    ema,
    every,
    exponential,
    fit,
    load_weights,
    noise_scale,
    progress_test,
    sparsity,
    sqrt_lr,
    tail,
)
from distgrow.checkpoint.spec import Checkpointing
from distgrow.data.spec import Loading
from distgrow.training.spec import Evaluation

ROWS = [(row, k % 3) for k, row in enumerate(torch.randn(160, 6, generator=torch.Generator().manual_seed(3)))]


class Stream(torch.utils.data.IterableDataset[Any]):
    """The rows again and again, in no number of passes."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from ROWS


class Counts(Hook):
    """A hook with a state : the samples that it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def after_update(self, update: Any) -> None:
        """Count."""
        self.seen += update.batch

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.seen = state["seen"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


OPTIMIZERS: dict[str, Any] = {
    "sgd": SGD(momentum=0.9, clip=0.5, groups=[ParameterGroup(match="0", lr_scale=0.3, weight_decay=0.1)]),
    "adamw": AdamW(no_decay=True, at_growth=AtGrowth(beta2="samples", weight_decay="samples", moments="reset")),
    "muon": Muon(groups=[ParameterGroup(match="4", lr_scale=0.5)]),
    "clars": CLARS(),
    "own": lambda model: [
        torch.optim.NAdam(model[:2].parameters(), lr=0.02), torch.optim.Adadelta(model[4].parameters(), lr=0.02)
    ],
}  # fmt: skip

#: Arguments of fit() beside those that all runs share; made anew for each run.
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "an EMA": lambda: {"average": ema(samples=100)},
    "a tail average": lambda: {"average": tail(fraction=0.6)},
    "hooks": lambda: {"hooks": [Counts(), EarlyStopping("loss", patience=50)]},
    "a stream": lambda: {"train": Stream(), "stages": every(samples=100)},
    "a mixture": lambda: {"train": Mixture([(ROWS[:90], 1.0), (ROWS[90:], {0: 2.0, 200: 0.5})])},
    "items": lambda: {"items": lambda batch: (batch[1] > 0).sum(), "loss": positive},
    "loader processes": lambda: {"loader": Loading(workers=2)},
    "growth by noise": lambda: {"growth": noise_scale(start=4, cap=32), "stages": None},
    "growth by progress": lambda: {"growth": progress_test(start=4, cap=32), "stages": None},
    "auto": lambda: {"growth": auto(start=4), "stages": None},
    "past gradients": lambda: {"extrapolate": Extrapolate(kind="past", rate=0.1)},
    "fresh gradients": lambda: {"extrapolate": Extrapolate(kind="fresh", rate=0.1), "average": ema(samples=100)},
    "noise in groups": lambda: {"extrapolate": Extrapolate(kind="noise", rate=0.1, local=True, group=4)},
    "a delay": lambda: {"engine": Torch(delay=3), "average": ema(samples=100)},
    "ahead": lambda: {"engine": Torch(ahead=1), "average": ema(samples=100)},
    "ahead, over items": lambda: {**FEATURES["items"](), "engine": Torch(ahead=1)},
    "ahead, by noise": lambda: {**FEATURES["growth by noise"](), "engine": Torch(ahead=1)},
    "ahead, by progress": lambda: {**FEATURES["growth by progress"](), "engine": Torch(ahead=1)},
    "ahead and late": lambda: {"engine": Torch(ahead=1, delay=1), "average": ema(samples=100)},
    "pruning": lambda: {"sparsity": sparsity(0.8, every=0.05), "average": ema(samples=100)},
    "pruning under a delay": lambda: {"engine": Torch(delay=3), "sparsity": sparsity(0.8, every=0.05)},
}


def positive(model: nn.Module, batch: Any) -> Tensor:
    """Mean over the rows whose label is above 0."""
    labels = batch[1].masked_fill(batch[1] == 0, -100)
    return nn.functional.cross_entropy(model(batch[0]), labels)


def trained(folder: Path, optimizer: Any, feature: str, *, resume: bool) -> tuple[list[Tensor], Any]:
    given = FEATURES[feature]()
    run = RunSpec(
        dir=str(folder), checkpoint=Checkpointing(every_steps=7, keep=99), eval=Evaluation(every_steps=9),
        loader=given.pop("loader", Loading()),
    )  # fmt: skip
    settings: dict[str, Any] = {
        "growth": exponential(4, 2, 32), "stages": every(epochs=0.7), "budget": budget(samples=480),
        "lr": None if callable(optimizer) else sqrt_lr(0.02), "train": ROWS, "loss": loss, **given,
    }  # fmt: skip
    model = network()
    result = fit(
        model, settings.pop("loss"), settings.pop("train"), test=ROWS[:40], optimizer=optimizer, run=run, resume=resume,
        **settings,
    )  # fmt: skip
    state = [value.clone() for value in model.state_dict().values()]
    if "average" in settings:
        load_weights(model, folder, average=True)
        state += [value.clone() for value in model.state_dict().values()]
    return state, result.progress


def told(folder: Path) -> dict[Any, Any]:
    """Return the updates and evaluations of a run, without what is a matter of time; of repeated ones the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"time_s", "samples_per_s", "tokens_per_s", "seconds", "sfo", "sfo_replayed"}
    kept = [line for line in lines if line["event"] in ("step", "skip", "eval")]
    return {
        (line["event"], line["samples"]): {key: value for key, value in line.items() if key not in timed}
        for line in kept
    }


def refused(optimizer: str, feature: str) -> bool:
    """Return whether the two do not go together."""
    if optimizer == "clars":  # a delay, shifts that hide noise, and steps that cannot be undone on the device
        return any(word in feature for word in ("delay", "ahead", "fresh gradients", "noise in groups"))
    return "ahead" in feature and (optimizer == "own" or (optimizer, feature) == ("muon", "ahead, by progress"))


MATRIX = [
    pytest.param(optimizer, feature, marks=[] if optimizer == "adamw" else pytest.mark.slow)
    for optimizer in OPTIMIZERS
    for feature in FEATURES
    if not refused(optimizer, feature)
]


@pytest.mark.parametrize(("optimizer", "feature"), MATRIX)
def test_a_resumed_run_is_the_one_that_never_stopped(optimizer: str, feature: str, tmp_path: Path) -> None:
    spec = OPTIMIZERS[optimizer]
    whole, progress = trained(tmp_path, spec, feature, resume=False)
    lines = told(tmp_path)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert len(kept) > 3
    for checkpoint in kept[len(kept) // 2 :]:
        shutil.rmtree(checkpoint)
    again, resumed = trained(tmp_path, spec, feature, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert resumed.ledger.replayed > 0
    assert resumed.ledger.first_time == progress.ledger.first_time
    assert (resumed.step, resumed.stage, resumed.policy) == (progress.step, progress.stage, progress.policy)
    assert told(tmp_path) == lines
