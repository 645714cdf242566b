"""Iterable data sets: the same rows on any number of ranks, with loader processes, and after a resume."""

import gc
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from distgrow import RunSpec, budget, constant, every, exponential, fit, noise_scale, norm_threshold
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.endless import ENDLESS
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Outcome, Progress
from distgrow.data.iterable import IterableStream
from distgrow.data.loader import DirectLoader, Loader, PrefetchingLoader
from distgrow.data.spec import Loading
from distgrow.growth.controller import Controller


class Stream(IterableDataset[Any]):
    """37 rows: their number, the pass, and what the generators give."""

    rows = 37

    def __init__(self) -> None:
        self.number, self.opened = 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.opened += 1
        order = torch.randperm(self.rows).tolist()
        for index in order:
            noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
            yield torch.tensor([index, self.number, noise], dtype=torch.double)


class Sized(Stream):
    def __len__(self) -> int:
        return self.rows


class Counting(IterableDataset[Any]):
    """Rows 0 … 36 with a state, by torchdata's protocol."""

    def __init__(self) -> None:
        self.at, self.read = 0, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 37:
            self.at, self.read = self.at + 1, self.read + 1
            yield torch.tensor([float(self.at - 1), 0.0, 0.0], dtype=torch.double)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Buffered(Counting):
    """A shuffle buffer that is not part of the state, as those of most libraries."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        held: list[torch.Tensor] = []
        for row in super().__iter__():
            held.append(row)
            if len(held) > 5:
                yield held.pop(random.randrange(len(held)))
        yield from held


KINDS: list[type[Any]] = [Stream, Sized, Counting, Buffered]


def controller(world: int = 1, max_micro: int = 4) -> Controller:
    return Controller(
        growth=exponential(4, 2, 16), stages=every(samples=40), budget=budget(samples=170), epoch=ENDLESS,
        world=world, max_micro=max_micro,
    )  # fmt: skip


def drawn(loaders: list[Loader], control: Controller, begin: Progress, skip: tuple[int, ...] = ()) -> torch.Tensor:
    """Every row that all ranks draw, in stream order, from `begin` on; updates numbered in `skip` are not applied."""
    progress, rows, update = begin, list[torch.Tensor](), 0
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        for loader in loaders:
            rows += [row for batch in loader.draw(progress, plan) for row in batch]
        progress = progress.after(plan, Outcome(applied=update not in skip))
        update += 1
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [(), (3, 7)])
def test_rows_depend_neither_on_ranks_nor_on_micro_batches_nor_on_the_loader(
    kind: type[Any], skip: tuple[int, ...]
) -> None:
    control = controller()
    alone = drawn([DirectLoader(IterableStream(kind(), seed=3), 0)], control, Progress(), skip)
    for number in range(4):  # each row once a pass
        assert sorted(alone[37 * number : 37 * (number + 1), 0].tolist()) == list(range(37))
    for world in (2, 3):
        loaders: list[Loader] = [DirectLoader(IterableStream(kind(), seed=3), rank) for rank in range(world)]
        assert torch.equal(drawn(loaders, controller(world, 2), Progress(), skip), alone)
    process = PrefetchingLoader(IterableStream(kind(), seed=3, recall=5), 0, control, workers=1, prefetch=3, pin=False)
    assert torch.equal(drawn([process], control, Progress(), skip), alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_state_brings_back_the_rows_on_any_number_of_ranks(kind: type[Any], workers: int) -> None:
    control = controller()
    alone = drawn([DirectLoader(IterableStream(kind(), seed=3), 0)], control, Progress())
    stream = IterableStream(kind(), seed=3, recall=5)
    loader = (
        PrefetchingLoader(stream, 0, control, workers=1, prefetch=3, pin=False) if workers else DirectLoader(stream, 0)
    )
    progress = Progress()
    for _ in range(13):  # beyond the first pass
        progress = control.advance(progress)
        plan = control.plan(progress)
        list(loader.draw(progress, plan))
        progress = progress.after(plan, Outcome())
    state = loader.state()
    assert state is not None
    for world in (1, 2):
        streams = [IterableStream(kind(), seed=3) for _ in range(world)]
        for other in streams:
            other.restore(state)
        loaders: list[Loader] = [DirectLoader(other, rank) for rank, other in enumerate(streams)]
        rest = drawn(loaders, controller(world), progress)
        assert torch.equal(rest, alone[-len(rest) :])


def test_a_state_of_the_data_set_saves_reading_if_it_is_exact() -> None:
    for kind, read in ((Counting, 13), (Buffered, 36)):
        stream, again = (IterableStream(kind(), seed=3) for _ in range(2))
        for start in range(0, 30, 6):
            stream.__getitems__(range(start, start + 6))
        again.restore(stream.state())
        rest = again.__getitems__(range(30, 37))
        assert torch.equal(rest, stream.__getitems__(range(30, 37)))
        assert again.by_state == (kind is Counting)
        assert again.dataset.read >= read if kind is Buffered else again.dataset.read == read


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Examples(IterableDataset[Any]):
    """Rows (inputs, label) without a length."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for _ in range(61):
            x = torch.randn(6)
            yield x, int(x.sum() > 0)


class FromState(Examples):
    """The same kind of rows, with a state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        while self.at < 61:
            self.at += 1
            x = torch.randn(6, generator=torch.Generator().manual_seed(self.at))
            yield x, int(x.sum() > 0)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


TEST = TensorDataset(torch.randn(20, 6), torch.randint(2, (20,)))


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(folder: Path, dataset: Any, *, resume: bool = False, workers: int = 0, **given: Any) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 2)
    run = RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=5, keep=99), loader=Loading(workers=workers))
    settings: dict[str, Any] = {"growth": exponential(4, 2, 16), "stages": every(samples=60), "test": TEST}
    settings |= {"budget": budget(samples=260), **given}
    fit(model, loss, dataset, run=run, resume=resume, **settings)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kind", [Examples, FromState])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_over_a_stream_is_the_run_that_was_never_stopped(
    kind: type[Any], workers: int, tmp_path: Path
) -> None:
    whole = trained(tmp_path / "run", kind(), workers=workers)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    for name in names[3:]:
        shutil.rmtree(tmp_path / "run/checkpoints" / name)
    assert torch.equal(trained(tmp_path / "run", kind(), resume=True, workers=workers), whole)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "budget": ({"budget": budget(epochs=2)}, r"budget.epochs=2.*no epochs; give samples or steps"),
    "stages": ({"stages": every(epochs=2)}, r"stages.every.epochs=2"),
    "default": ({"stages": None}, r"stages.every.epochs=5"),
    "policy": ({"growth": noise_scale(start=4, cap=16), "stages": None}, r"growth.min_stage.epochs=0.1"),
    "probes": ({"growth": norm_threshold(start=4, cap=16), "stages": None}, r"epochs|give probe="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_epochs_of_a_stream_without_a_length_are_refused_by_their_key(case: str, tmp_path: Path) -> None:
    given, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path / "run", Examples(), **given)
    assert not (tmp_path / "run").exists()


def test_a_constant_batch_over_a_stream_needs_no_stages_and_tells_samples_for_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "run", Examples(), growth=constant(16), stages=None)
    told = capsys.readouterr().err
    assert "260 samples: loss" in told
    assert "epoch 0.0:" not in told


def test_a_stream_with_a_length_has_epochs(tmp_path: Path) -> None:
    class Known(Examples):
        def __len__(self) -> int:
            return 61

    trained(tmp_path / "run", Known(), budget=budget(epochs=2), stages=every(epochs=1))


def of_length(told: int) -> Any:
    class Wrong(Examples):
        def __len__(self) -> int:
            return told

    return Wrong()


class Once(Examples):
    """Rows that are gone after the first pass."""

    def __init__(self) -> None:
        self.rows = iter([(torch.randn(6), 0) for _ in range(61)])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return self.rows


class Stateless(FromState):
    def state_dict(self) -> dict[str, int]:
        raise KeyError("shard")


class Spoilt(FromState):
    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["at"] > 5:
            raise KeyError("shard")
        self.at = state["at"]


@pytest.fixture
def collected() -> Iterator[None]:
    """Let go of loaders, and so of their processes, that errors' frames hold."""
    yield
    gc.collect()


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("workers", [0, 1])
def test_streams_at_fault_are_named(workers: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ended after 61 rows of pass 0, but its len\(\) is 70"):
        trained(tmp_path / "a", of_length(70), workers=workers)
    with pytest.raises(ConfigError, match="goes on after 50 rows"):
        trained(tmp_path / "b", of_length(50), workers=workers)
    with pytest.raises(ConfigError, match="no rows in pass 1: its __iter__ must begin anew"):
        trained(tmp_path / "c", Once(), workers=workers)
    with pytest.raises(ConfigError, match="gives no state: state_dict raised KeyError: 'shard'"):
        trained(tmp_path / "e", Stateless(), workers=workers)
    trained(tmp_path / "d", FromState(), workers=workers, budget=budget(samples=40))
    shutil.rmtree(sorted((tmp_path / "d/checkpoints").glob("step-*"))[-1])
    with pytest.raises(ConfigError, match="does not take its own state back: load_state_dict raised KeyError: 'shard'"):
        trained(tmp_path / "d", Spoilt(), resume=True, workers=workers, budget=budget(samples=40))


def test_more_loader_processes_than_one_would_read_a_stream_several_times(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.loader.workers=2: each loader process would read the whole"):
        trained(tmp_path / "run", Examples(), workers=2)
