"""A rank of test_ahead_ranks.py: runs whose outcomes are told one update later, beside those that wait."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgrow import (
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
    sqrt_lr,
)
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.errors import TrainingFailed
from distgrow.distributed.world import World, joined
from distgrow.launch.local import leave

ROWS = [(row, k % 3) for k, row in enumerate(torch.randn(160, 6, generator=torch.Generator().manual_seed(3)))]
SPOILED = [(row * float("nan") if k == 70 else row, label) for k, (row, label) in enumerate(ROWS)]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def positive(model: nn.Module, batch: Any) -> Tensor:
    """Mean over the rows whose label is above 0."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1].masked_fill(batch[1] == 0, -100))


ITEMS: dict[str, Any] = {"items": lambda batch: (batch[1] > 0).sum(), "loss": positive}


class Tight:
    """A loss that rank 1 has no memory for at some micro-batches of more than 4 rows, by their number."""

    def __init__(self, rank: int, short: range) -> None:
        self.rank, self.short, self.seen = rank, short, -1

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled() and model.training and len(batch[0]) > 4:
            self.seen += 1
            if self.rank == 1 and self.seen in self.short:
                raise MemoryError("too many rows")
        return loss(model, batch)


def trained(folder: Path, world: World, *, ahead: int, delay: int = 0, resume: bool = False, **more: Any) -> Any:
    """Return the model's state after a run, flat, and its progress."""
    torch.manual_seed(0)
    normed = nn.Identity() if "items" in more else nn.BatchNorm1d(8)  # whose statistics are those of a rank
    model = nn.Sequential(nn.Linear(6, 8), normed, nn.Tanh(), nn.Linear(8, 3))
    settings: dict[str, Any] = {
        "growth": exponential(6, 2, 40), "stages": every(epochs=0.7), "lr": sqrt_lr(0.02), "loss": loss, "train": ROWS,
        "optimizer": SGD(momentum=0.5, clip=0.5), "budget": budget(samples=500), **more,
    }  # fmt: skip
    engine = Torch(precision="float64", max_micro=8, ahead=ahead, delay=delay)  # pyright: ignore[reportArgumentType]
    run = RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=6, keep=99))
    function, rows = settings.pop("loss"), settings.pop("train")
    result = fit(model, function, rows, engine=engine, world=world, resume=resume, run=run, **settings)
    return torch.cat([value.double().flatten() for value in model.state_dict().values()]), result.progress


def halved(folder: Path, world: World) -> None:
    """Remove the later half of a run's checkpoints, as if it had been killed."""
    if world.rank == 0:
        kept = sorted((folder / "checkpoints").iterdir())
        for checkpoint in kept[len(kept) // 2 :]:
            shutil.rmtree(checkpoint)
    world.sum([0.0])


def check_empty(folder: Path, world: World) -> None:
    """Hold runs whose first batch counts no items, before the optimizer has any state, against those that wait."""
    seen: list[Tensor] = []

    def looking(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(batch[0])
        return loss(model, batch)

    settings: dict[str, Any] = {"growth": constant(10), "stages": None}
    trained(folder / "order", world, ahead=0, loss=looking, **{**settings, "budget": budget(steps=1)})
    first = [row for rows in world.gather(seen) for row in rows]
    rows = [(row, 0 if any(torch.equal(row, one.float()) for one in first) else 1) for row, _ in ROWS]
    settings |= {**ITEMS, "train": rows, "budget": budget(samples=100)}
    for name, optimizer in {"sgd": SGD(momentum=0.5), "muon": Muon()}.items():
        for delay in (0, 1):
            places = [folder / f"empty-{name}{delay}{ahead}" for ahead in (0, 1)]
            waits, known = trained(places[0], world, ahead=0, delay=delay, optimizer=optimizer, **settings)
            goes, told = trained(places[1], world, ahead=1, delay=delay, optimizer=optimizer, **settings)
            assert torch.equal(waits, goes), (name, delay)
            assert known.ledger == told.ledger, (name, delay)
            assert told.ledger.skipped > 0


def check(folder: Path, world: World) -> None:
    """Hold runs against each other."""
    for name, more in {
        "sgd": {"average": ema(samples=100)}, "adamw": {"optimizer": AdamW()},
        "spoiled": {"train": SPOILED, "growth": constant(10), "stages": None},
    }.items():  # fmt: skip
        for delay in (0, 1):
            if delay and name == "spoiled":
                continue
            waits, known = trained(folder / f"{name}{delay}0", world, ahead=0, delay=delay, **more)
            goes, told = trained(folder / f"{name}{delay}1", world, ahead=1, delay=delay, **more)
            assert torch.equal(waits, goes), (name, delay)
            assert known.ledger == told.ledger, (name, delay)
    for name, delay, more in (
        ("items", 0, ITEMS), ("noise", 0, {"growth": noise_scale(start=6, cap=48), "stages": None}), ("late", 1, ITEMS),
    ):  # fmt: skip
        whole, known = trained(folder / name, world, ahead=1, delay=delay, **more)
        halved(folder / name, world)
        again, told = trained(folder / name, world, ahead=1, delay=delay, resume=True, **more)
        assert torch.equal(whole, again), name
        assert (known.step, known.stage, known.tokens) == (told.step, told.stage, told.tokens), name
        assert told.ledger.replayed > 0, name
        halved(folder / name, world)  # for a group of another size
    waits, known = trained(folder / "tight0", world, ahead=0, loss=Tight(world.rank, range(30)))
    for delay in (0, 1):
        goes, told = trained(folder / f"tight1{delay}", world, ahead=1, delay=delay, loss=Tight(world.rank, range(30)))
        assert delay or torch.equal(waits, goes)
        assert told.ledger.discarded == known.ledger.discarded > 0
        late = {"loss": Tight(world.rank, range(3, 99)), "growth": exponential(16, 2, 32)}
        try:
            trained(folder / f"failed{delay}", world, ahead=1, delay=delay, **late)
        except TrainingFailed as error:
            assert "engine.max_micro" in str(error)
        else:
            raise AssertionError("it went on without a part of the batch")


if __name__ == "__main__":
    with joined("cpu") as ranks:
        check(Path(sys.argv[1]), ranks)
        check_empty(Path(sys.argv[1]), ranks)
    leave()
