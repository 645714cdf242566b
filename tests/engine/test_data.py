"""Loaders draw exactly the rows of a plan, whoever draws them and whatever happens in between."""

import gc
import multiprocessing
import os
import random
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distgrow import RunSpec, budget, constant, every, exponential, fit
from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.core.noise_stats import Measured
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.core.stages import MinStage
from distgrow.data.dataset import Batched, check_rows_by_number, is_stream
from distgrow.data.loader import DirectLoader, Loader, PrefetchingLoader
from distgrow.data.spec import Loading
from distgrow.data.stream import SampleStream, evaluation_batches
from distgrow.distributed.world import World
from distgrow.growth import Growth
from distgrow.growth.controller import Controller
from distgrow.growth.noise_scale import NoiseScale
from distgrow.growth.progress_test import ProgressTest


class Noisy:
    """A user's data set that draws from all three usual random generators."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(
            [index, random.random(), float(np.random.rand()), float(torch.rand(()))], dtype=torch.double
        )


def controller(world: int = 1, max_micro: int = 4) -> Controller:
    """Three stages over 50 samples."""
    return Controller(
        growth=exponential(4, 2, 16), stages=every(samples=40), budget=budget(samples=170), epoch=50,
        world=world, max_micro=max_micro,
    )  # fmt: skip


def drawn(
    loader_of: Any, control: Controller, skip: tuple[int, ...] = (), shows: Measured | None = None
) -> list[torch.Tensor]:
    """Every row that all ranks draw, in stream order; the updates numbered in `skip` are not applied, all show that."""
    loaders: list[Loader] = [loader_of(rank) for rank in range(control.world)]
    progress, rows, update = Progress(), [], 0
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        for loader in loaders:
            rows += [row for batch in loader.draw(progress, plan) for row in batch]
        progress = progress.after(plan, Outcome(applied=update not in skip, measured=shows or Measured()))
        update += 1
    return rows


def test_a_row_and_its_randomness_follow_from_seed_and_position_alone() -> None:
    one = drawn(lambda rank: DirectLoader(SampleStream(Noisy(), seed=3), rank), controller())
    other = drawn(lambda rank: DirectLoader(SampleStream(Noisy(), seed=3), rank), controller(world=3, max_micro=2))
    assert torch.equal(torch.stack(one), torch.stack(other))
    assert sorted(row[0].item() for row in one[:50]) == list(range(50))
    assert len({row[1].item() for row in one}) == len(one)  # a new draw in every epoch
    another = drawn(lambda rank: DirectLoader(SampleStream(Noisy(), seed=4), rank), controller())
    assert not torch.equal(torch.stack(one), torch.stack(another))


@pytest.mark.parametrize("skip", [(), (0,), (3, 4, 9)])
def test_prefetching_draws_what_direct_loading_draws(skip: tuple[int, ...]) -> None:
    control, positions = controller(world=2), SampleStream(Noisy(), seed=3)
    direct = drawn(lambda rank: DirectLoader(positions, rank), control, skip)
    ahead = drawn(
        lambda rank: PrefetchingLoader(positions, rank, control, workers=2, prefetch=3, pin=False), control, skip
    )
    assert torch.equal(torch.stack(direct), torch.stack(ahead))


def mixed(rows: list[torch.Tensor]) -> torch.Tensor:
    """A collation that draws from all three generators."""
    return torch.stack(rows) * random.random() * float(np.random.rand()) * float(torch.rand(()))


def test_what_a_collation_draws_is_the_same_in_loader_processes() -> None:
    control, positions = controller(world=2), SampleStream(Noisy(), seed=3, collate=mixed)
    direct = drawn(lambda rank: DirectLoader(positions, rank), control)
    ahead = drawn(lambda rank: PrefetchingLoader(positions, rank, control, workers=2, prefetch=3, pin=False), control)
    assert torch.equal(torch.stack(direct), torch.stack(ahead))


@pytest.mark.parametrize("skip", [(), (2, 3)])
@pytest.mark.parametrize(
    ("growth", "world", "max_micro"),
    [
        (ProgressTest(start=4, cap=16, min_stage=MinStage(updates=3)), 2, 4),
        (NoiseScale(start=4, cap=16, min_stage=MinStage(updates=2), stages_at_once=1), 2, 4),
        (NoiseScale(start=4, cap=16, min_stage=MinStage(updates=1), stages_at_once=1), 1, 16),
    ],
)
def test_moves_that_nobody_foresaw_lose_and_repeat_no_row(
    growth: Growth, world: int, max_micro: int, skip: tuple[int, ...]
) -> None:
    control = Controller(growth=growth, budget=budget(samples=170), epoch=50, world=world, max_micro=max_micro)
    positions, shows = SampleStream(Noisy(), seed=3), Measured(parts_sq=100.0, batch_sq=1.0, product=-1.0)
    direct = drawn(lambda rank: DirectLoader(positions, rank), control, skip, shows)
    ahead = drawn(
        lambda rank: PrefetchingLoader(positions, rank, control, workers=2, prefetch=3, pin=False),
        control, skip, shows,
    )  # fmt: skip
    assert torch.equal(torch.stack(direct), torch.stack(ahead))
    spent = 170 + sum(plan.batch for k, plan in enumerate(plans(control, skip, shows)) if k in skip)
    assert len(direct) == spent
    assert {plan.stage for plan in plans(control, skip, shows)} >= {0, 1}


def plans(control: Controller, skip: tuple[int, ...], shows: Measured) -> list[Plan]:
    """The updates of the run that `drawn` draws."""
    progress, found = Progress(), []
    while not control.done(progress):
        progress = control.advance(progress)
        found.append(control.plan(progress))
        progress = progress.after(found[-1], Outcome(applied=len(found) - 1 not in skip, measured=shows))
    return found


class Loaders:
    """A data set whose rows are the ids of the processes that load them."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_workers_survive_growth() -> None:
    control = controller()
    loader = PrefetchingLoader(SampleStream(Loaders()), 0, control, workers=2, prefetch=2, pin=False)
    progress, pids = Progress(), set[int]()
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        pids.update(*(batch.tolist() for batch in loader.draw(progress, plan)))
        progress = progress.after(plan, Outcome())
    assert progress.stage == 2
    assert len(pids) == 2


def test_workers_end_with_their_loader() -> None:
    control = controller()
    loader = PrefetchingLoader(SampleStream(Noisy()), 0, control, workers=2, prefetch=2, pin=False)
    list(loader.draw(Progress(), control.plan(Progress())))
    assert len(multiprocessing.active_children()) == 2
    del loader
    assert not multiprocessing.active_children()


def test_workers_ignore_sigterm_but_from_their_trainer() -> None:
    control = controller(max_micro=1)  # of an update's four micro-batches each of two workers loads some
    loader = PrefetchingLoader(SampleStream(Noisy()), 0, control, workers=2, prefetch=1, pin=False)
    list(loader.draw(Progress(), control.plan(Progress())))
    workers = multiprocessing.active_children()
    subprocess.run(["kill", *(str(worker.pid) for worker in workers)], check=True)
    workers[0].join(timeout=0.5)
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(timeout=10)
        assert worker.exitcode == 0


def test_loading_leaves_the_process_random_states_alone() -> None:
    states = random.getstate(), torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    SampleStream(Noisy()).__getitems__(range(5))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == states[2]


class OneByOne(torch.utils.data.Dataset[Any]):
    """The same rows, of a kind that nobody knows."""

    def __init__(self, dataset: torch.utils.data.TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def test_a_tensor_data_set_is_indexed_at_once_and_the_same() -> None:
    tensors = torch.arange(34).reshape(17, 2), torch.randn(17, 3, 4, dtype=torch.float64), torch.arange(17)
    dataset = torch.utils.data.TensorDataset(*tensors)
    for rows in (range(5), range(3, 40), range(100, 101)):
        whole, single = (SampleStream(each, seed=3).__getitems__(rows) for each in (dataset, OneByOne(dataset)))
        assert type(whole) is type(single)
        for one, other in zip(whole, single, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    for one, other in zip(
        *(evaluation_batches(each, World(), 6) for each in (dataset, OneByOne(dataset))), strict=True
    ):
        torch.testing.assert_close(list(one[0]), list(other[0]), rtol=0, atol=0)
        assert one[1] == other[1]
    own = SampleStream(dataset, collate=lambda rows: sum(float(row[2]) for row in rows))
    assert own.__getitems__(range(17)) == sum(range(17))  # a collation of one's own still sees the rows


@pytest.mark.parametrize("world", [1, 3, 60])
def test_evaluation_covers_every_row_once_over_all_ranks(world: int) -> None:
    parts = [list(evaluation_batches(Noisy(), World(rank=rank, size=world), 7)) for rank in range(world)]
    assert [int(row[0]) for part in parts for batch, rows in part for row in batch[:rows]] == list(range(50))
    assert len({len(part) for part in parts}) == 1
    assert all(1 <= len(batch) <= 7 for part in parts for batch, _ in part)


def test_an_order_over_a_billion_samples_feeds_a_loader() -> None:
    class Billion:
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(index)

    control = Controller(growth=exponential(64, 2, 256), budget=budget(samples=4096), epoch=10**9)
    rows = drawn(lambda rank: DirectLoader(SampleStream(Billion()), rank), control)
    assert len({int(row) for row in islice(rows, 4096)}) == 4096


class Table(OneByOne):
    """Rows by number, and a method `batch` that means something else, as Hugging Face's data sets have."""

    def batch(self, batch_size: int, drop_last_batch: bool = False) -> Any:
        raise AssertionError("it was taken for distgrow's")


class Together(Batched):
    """Rows that are made together alone."""

    def __len__(self) -> int:
        return 17

    def batch(self, indices: Any, seeds: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([indices, seeds.astype(np.int64) % 1000], axis=1))


def test_only_a_class_that_says_so_is_asked_for_whole_batches() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(17), torch.arange(17))
    rows, table = SampleStream(dataset).__getitems__(range(9)), SampleStream(Table(dataset)).__getitems__(range(9))
    assert all(torch.equal(one, other) for one, other in zip(rows, table, strict=True))
    batches = evaluation_batches(Table(dataset), World(), 4)
    assert torch.equal(torch.cat([batch[0] for batch, _ in batches]), torch.arange(17))
    together = SampleStream(Together()).__getitems__(range(17))
    assert torch.equal(together[:, 0].sort().values, torch.arange(17))
    assert len(together[:, 1].unique()) > 10


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


class SizedStream(Stream):
    def __len__(self) -> int:
        return 20


ROWS = torch.utils.data.TensorDataset(torch.zeros(20, 3))
WEIGHTED = torch.utils.data.WeightedRandomSampler([1.0] * 20, 20)
LOADER = torch.utils.data.DataLoader
NO_ROWS: dict[str, tuple[Any, str]] = {
    "stream": (Stream(), "is Stream, which has no rows by number"),
    "sized stream": (SizedStream(), "is SizedStream, which has no rows by number"),
    "iterator": (iter(()), "is tuple_iterator, which has no rows by number"),
    "none": (None, "is NoneType, which has no rows by number"),
    "splits": ({"train": ROWS}, "is dict, which has no rows by number"),
    "loader": (LOADER(ROWS, 8), r"is a DataLoader, .*=loader.dataset, collate=loader.collate_fn$"),
    "weighted loader": (LOADER(ROWS, 8, sampler=WEIGHTED), "multiply each row's loss by its weight"),
    "sampler": (WEIGHTED, "is a WeightedRandomSampler, .* give the data set. Its weights"),
}


@pytest.mark.parametrize("kind", NO_ROWS)
def test_what_has_no_rows_by_number_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    dataset, message = NO_ROWS[kind]
    model, run = torch.nn.Linear(3, 1), RunSpec(dir=str(tmp_path / "run"))
    sets: list[dict[str, Any]] = [] if is_stream(dataset) else [{"train": dataset}]
    if dataset is not None:
        tests = [] if isinstance(dataset, dict) else [{"train": ROWS, "test": dataset}]  # a dict is test sets by name
        sets += [*tests, {"train": ROWS, "probe": dataset}]
    for given in sets:
        with pytest.raises(ConfigError, match=message):
            fit(model, lambda *_: torch.ones(()), growth=constant(4), budget=budget(epochs=1), run=run, **given)
        with pytest.raises(ConfigError, match=message):
            check_rows_by_number(dataset, "the training set")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["workers", "prefetch"])
def test_loading_that_no_host_could_do_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}\n.*less than or equal to 1024"):
        Loading.model_validate({key: 10**9})


class Full:
    """A data set for whose rows there is no room."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def test_shared_memory_that_is_too_small_is_named_with_the_way_out() -> None:
    control = controller()
    loader = PrefetchingLoader(SampleStream(Full()), 0, control, workers=2, prefetch=3, pin=False)
    with pytest.raises(TrainingFailed, match=r"/dev/shm .*run.loader.workers=2 .*run.loader.prefetch=3"):
        list(loader.draw(Progress(), control.plan(Progress())))
    del loader
    gc.collect()  # the error's frames hold it, and with it its processes
