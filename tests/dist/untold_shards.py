"""A rank of test_ahead_shards.py: sharded runs whose outcomes are told one update later, beside those that wait."""

import json
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from untold import ITEMS, ROWS, halved, loss

from distgrow import (
    FSDP,
    SGD,
    AdamW,
    Muon,
    RunSpec,
    Torch,
    budget,
    constant,
    ema,
    every,
    exponential,
    fit,
    noise_scale,
    progress_test,
    sqrt_lr,
)
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.noise_stats import Measuring, Noise
from distgrow.core.optimizer_plan import AtGrowth
from distgrow.distributed.world import World, joined
from distgrow.launch.local import leave


class Block(nn.Module):
    """A unit, with a buffer that a row which is not finite would spoil, and widths that two ranks do not divide."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(7, 9), norm, nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.norm(self.up(x))))


def network(*, normed: bool = True) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(nn.BatchNorm1d(9) if normed else nn.Identity()) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 7), *blocks, nn.Linear(7, 3))


MEASURED: dict[str, dict[str, Any]] = {
    "noise": {"growth": noise_scale(start=6, cap=48), "optimizer": SGD(momentum=0.5, weight_decay=0.01, clip=0.5)},
    "progress": {"growth": progress_test(start=6, cap=48), "optimizer": SGD(weight_decay=0.01, clip=0.5)},
    "adamw": {"growth": progress_test(start=6, cap=48), "optimizer": AdamW(clip=0.5), "lr": sqrt_lr(0.01)},
}


PLANNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({}, {}),
    "plain": ({"reduce": "every"}, {"optimizer": SGD()}),
    "grad_op": ({"shard": "grad_op"}, {}),
    "hybrid": ({"shard": "hybrid", "replicas": 2}, {"optimizer": AdamW(clip=0.5)}),
    "adamw": ({}, {"optimizer": AdamW()}),
    "muon": ({}, {"optimizer": Muon(clip=0.5)}),
    "items": ({}, {**ITEMS, "optimizer": AdamW(clip=0.5)}),
    "half": ({"precision": "bfloat16"}, {"model": lambda: network(normed=False)}),
    "reset": ({}, {"optimizer": SGD(momentum=0.9, at_growth=AtGrowth(moments="reset"))}),
}
FAULTY: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({}, SGD(momentum=0.5, clip=0.5)),
    "adamw": ({"shard": "grad_op"}, AdamW()),
    "muon": ({}, Muon()),
    "hybrid": ({"shard": "hybrid", "replicas": 2}, AdamW(clip=0.5)),
}


def trained(folder: Path, world: World, engine: Any, *, resume: bool = False, **more: Any) -> tuple[Tensor, Any]:
    """Return the model's state after a run, flat, and its progress."""
    settings: dict[str, Any] = {
        "growth": exponential(6, 2, 40), "stages": every(epochs=0.7), "lr": sqrt_lr(0.02), "loss": loss, "train": ROWS,
        "optimizer": SGD(momentum=0.5, clip=0.5), "budget": budget(samples=500), "average": ema(samples=100), **more,
    }  # fmt: skip
    model = settings.pop("model", lambda: network(normed="items" not in more))()
    spec = RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=6, keep=99), noise=Measuring(every=3))
    function, rows = settings.pop("loss"), settings.pop("train")
    result = fit(model, function, rows, engine=engine, world=world, resume=resume, run=spec, **settings)
    return torch.cat([value.double().flatten() for value in model.state_dict().values()]), result.progress


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of updates, without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"time_s", "samples_per_s", "tokens_per_s"}
    return [{k: v for k, v in line.items() if k not in timed} for line in found if line["event"] in ("step", "skip")]


def of_steps(folder: Path) -> list[dict[str, Any]]:
    """Return the same without noise: which updates are measured follows from their number."""
    noise = {"grad_sq", "noise_trace", "noise_scale"}
    return [{k: v for k, v in line.items() if k not in noise} for line in lines(folder)]


class Faulty:
    """A loss that is not finite on rank 1 at some of its calls in training, by their number."""

    def __init__(self, rank: int, at: tuple[int, ...]) -> None:
        self.rank, self.at, self.seen = rank, at, -1

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.seen += model.training and torch.is_grad_enabled()
        return loss(model, batch) * (float("nan") if self.rank == 1 and self.seen in self.at else 1.0)


def both(folder: Path, world: World, keys: dict[str, Any], more: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold a planned run to the last bit against one that waits. Return its lines."""
    (waits, known), (goes, told) = (
        trained(folder / str(ahead), world, FSDP(max_micro=8, ahead=ahead, **keys), **more) for ahead in (0, 1)
    )
    assert torch.equal(waits, goes), folder.name
    assert replace(known, noise=Noise()) == replace(told, noise=Noise()), folder.name
    assert of_steps(folder / "0") == of_steps(folder / "1"), folder.name
    return of_steps(folder / "1")


def check_planned(folder: Path, world: World, names: list[str]) -> None:
    """Hold planned runs of three stages against those that wait."""
    for name in names:
        found = both(folder / name, world, *PLANNED[name])
        assert {line["stage"] for line in found} >= {0, 1, 2}
        assert all(line["event"] == "step" for line in found)


def check_faulty(folder: Path, world: World, names: list[str]) -> None:
    """Hold runs with gradients that one rank cannot compute, the first of all among them, against those that wait."""
    for name in names:
        keys, optimizer = FAULTY[name]
        more = {"optimizer": optimizer, "growth": constant(10), "stages": None, "average": None}
        faulty = Faulty(world.rank, (0, 8, 9, 17))
        (waits, known), (goes, told) = (
            trained(folder / f"{name}{ahead}", world, FSDP(max_micro=8, ahead=ahead, **keys), loss=copy(faulty), **more)
            for ahead in (0, 1)
        )
        assert torch.equal(waits, goes), name
        assert replace(known, noise=Noise()) == replace(told, noise=Noise()), name
        assert of_steps(folder / f"{name}0") == of_steps(folder / f"{name}1"), name
        found = [line["samples"] for line in of_steps(folder / f"{name}1") if line["event"] == "skip"]
        assert found == [10, 90, 100, 180]
        assert told.ledger.skipped == 40


def check_measured(folder: Path, world: World) -> None:
    """Hold decisions against those of plain torch that does not wait, and of what waits."""
    for name, more in MEASURED.items():
        more = {"stages": None, **more}
        engines = {
            "torch": Torch(max_micro=8, ahead=1),
            "shards": FSDP(max_micro=8, ahead=1),
            "waits": FSDP(max_micro=8),
        }
        for kind, engine in engines.items():
            trained(folder / f"{kind}-{name}", world, engine, model=lambda: network(normed=False), **more)
        plain, cut, waits = (lines(folder / f"{kind}-{name}") for kind in engines)
        exact = ("step", "samples", "stage", "batch", "micro", "accum", "sfo")
        assert [[line[key] for key in exact] for line in plain] == [[line[key] for key in exact] for line in cut]
        for one, other in zip(plain, cut, strict=True):
            assert one.keys() == other.keys()
            for key in {"lr", "loss", "grad_norm", "noise_trace", "noise_scale", "grad_sq"} & one.keys():
                near = other[key] if one[key] is None else pytest.approx(one[key], rel=1e-3)
                assert other[key] == near, (name, key)
        first = [next(line["step"] for line in found if line["stage"] > 0) for found in (waits, cut)]
        assert name != "noise" or first[1] == first[0] + 1


def told_apart(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines without what is charged for evaluations that are made again."""
    return [{key: value for key, value in line.items() if key not in ("sfo", "sfo_replayed")} for line in found]


def check_resumed(folder: Path, world: World) -> None:
    """Hold runs that go on from the middle against whole ones."""
    bare = {"stages": None, "model": lambda: network(normed=False)}  # a rank's own buffers are not kept
    for name, more in {"items": ITEMS, "noise": {**bare, **MEASURED["noise"]}}.items():
        engine = FSDP(max_micro=8, ahead=1)
        whole, known = trained(folder / name, world, engine, **more)
        before = lines(folder / name)
        halved(folder / name, world)
        again, told = trained(folder / name, world, engine, resume=True, **more)
        assert torch.equal(whole, again), name
        assert (known.step, known.stage, known.tokens) == (told.step, told.stage, told.tokens), name
        assert told.ledger.replayed > 0, name
        kept = {line["step"]: line for line in lines(folder / name)}
        assert told_apart(before) == told_apart([kept[line["step"]] for line in before]), name
        halved(folder / name, world)  # for a group of another size


def check_moved(folder: Path, world: World) -> None:
    """Hold a run that goes on with fewer ranks against one that was never of more."""
    engine = FSDP(max_micro=8, ahead=1)
    alone, progress = trained(folder / "alone", world, engine, **ITEMS)
    moved, told = trained(folder / "items", world, engine, resume=True, **ITEMS)
    assert float((alone - moved).norm() / alone.norm()) < 1e-5
    assert progress.tokens == told.tokens > 0
    assert progress.ledger.applied == told.ledger.applied


CHECKS = {
    "planned": check_planned, "faulty": check_faulty, "measured": check_measured, "resumed": check_resumed,
    "moved": check_moved,
}  # fmt: skip

if __name__ == "__main__":
    with joined("cpu", alone=True) as ranks:
        place, check, *names = sys.argv[1:]
        CHECKS[check](Path(place), ranks, *[names] * bool(names))
    leave()
