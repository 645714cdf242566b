"""A rank of test_streams.py: runs over files and streams; rank 0 writes which rows trained, and what was refused."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from distgrow import Files, Mixture, RunSpec, budget, every, exponential, fit
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World, joined
from distgrow.launch.local import leave

SEEN: list[int] = []


class Stream(IterableDataset[Any]):
    """Rows by number, which another rank may have others of, or fewer."""

    def __init__(self, first: int = 0, rows: int = 50) -> None:
        self.first, self.rows = first, rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.first, self.first + self.rows):
            yield {"id": index, "x": torch.full((3,), index / 50)}


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    if model.training:
        SEEN.extend(batch["id"].tolist())
    return model(batch["x"]).square().mean()


def trained(dataset: Any, folder: Path, world: World, *, samples: int, resume: bool = False) -> list[list[int]]:
    """The rows that each rank trained on."""
    torch.manual_seed(0)
    SEEN.clear()
    fit(
        torch.nn.Linear(3, 1), loss, dataset, growth=exponential(4, 2, 16), stages=every(samples=60), world=world,
        budget=budget(samples=samples), resume=resume,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=4, keep=99)),
    )  # fmt: skip
    return world.gather(sorted(SEEN))


def refused(dataset: Any, folder: Path, world: World) -> str:
    try:
        trained(dataset, folder, world, samples=200)
    except ConfigError as error:
        return str(error)
    return ""


def main(folder: Path, *, resume: bool) -> None:
    """Train on all data sets, or go on with runs that another number of ranks has begun."""
    with joined("cpu", alone=True) as world:
        found: dict[str, Any] = {}
        files = Files(folder / "*.parquet", window=20, cache=folder / "cache")
        for name, dataset in (("files", files), ("mixture", Mixture([(files, 1), (files, 3)])), ("stream", Stream())):
            found[name] = trained(dataset, folder / name, world, samples=200, resume=resume)
        if not resume and world.size > 1:
            found["other rows"] = refused(Stream(first=10 * world.rank), folder / "a", world)
            found["other length"] = refused(Stream(rows=30 + world.rank), folder / "b", world)
        if world.rank == 0:
            (folder / f"found-{resume}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), resume=sys.argv[2] == "resume")
