"""Loaders, data sets and models."""

import io
import multiprocessing
import random
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distgrow import datasets, files
from distgrow.adaptive import ProgressTest
from distgrow.architectures import GPT, MLP, Images, ResNet, Softmax, Tokens
from distgrow.controller import Controller
from distgrow.data import DirectLoader, Loader, Positions, PrefetchingLoader, evaluation_batches
from distgrow.library import budget, every, exponential
from distgrow.noise import Measured
from distgrow.order import seeds
from distgrow.plan import Plan
from distgrow.progress import Outcome, Progress
from distgrow.schedule import Growth
from distgrow.spec import ConfigError
from distgrow.stages import Dwell
from distgrow.tasks import Cifar10, Digits, Text
from distgrow.tracking import NoiseScale
from distgrow.world import World


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
    one = drawn(lambda rank: DirectLoader(Positions(Noisy(), seed=3), rank), controller())
    other = drawn(lambda rank: DirectLoader(Positions(Noisy(), seed=3), rank), controller(world=3, max_micro=2))
    assert torch.equal(torch.stack(one), torch.stack(other))
    assert sorted(row[0].item() for row in one[:50]) == list(range(50))
    assert len({row[1].item() for row in one}) == len(one)  # a new draw in every epoch
    another = drawn(lambda rank: DirectLoader(Positions(Noisy(), seed=4), rank), controller())
    assert not torch.equal(torch.stack(one), torch.stack(another))


@pytest.mark.parametrize("skip", [(), (0,), (3, 4, 9)])
def test_prefetching_draws_what_direct_loading_draws(skip: tuple[int, ...]) -> None:
    control, positions = controller(world=2), Positions(Noisy(), seed=3)
    direct = drawn(lambda rank: DirectLoader(positions, rank), control, skip)
    ahead = drawn(
        lambda rank: PrefetchingLoader(positions, rank, control, workers=2, prefetch=3, pin=False), control, skip
    )
    assert torch.equal(torch.stack(direct), torch.stack(ahead))


@pytest.mark.parametrize("skip", [(), (2, 3)])
@pytest.mark.parametrize(
    ("growth", "world", "max_micro"),
    [
        (ProgressTest(start=4, cap=16, dwell=Dwell(updates=3)), 2, 4),
        (NoiseScale(start=4, cap=16, dwell=Dwell(updates=2), rungs=1), 2, 4),
        (NoiseScale(start=4, cap=16, dwell=Dwell(updates=1), rungs=1), 1, 16),
    ],
)
def test_moves_that_nobody_foresaw_lose_and_repeat_no_row(
    growth: Growth, world: int, max_micro: int, skip: tuple[int, ...]
) -> None:
    control = Controller(growth=growth, budget=budget(samples=170), epoch=50, world=world, max_micro=max_micro)
    positions, shows = Positions(Noisy(), seed=3), Measured(parts_sq=100.0, batch_sq=1.0, product=-1.0)
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


def test_workers_survive_growth() -> None:
    control = controller()
    loader = PrefetchingLoader(Positions(Noisy()), 0, control, workers=2, prefetch=2, pin=False)
    progress, pids = Progress(), set()
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        list(loader.draw(progress, plan))
        pids.add(tuple(worker.pid for worker in loader._stream._workers))  # pyright: ignore
        progress = progress.after(plan, Outcome())
    assert progress.stage == 2
    assert len(pids) == 1


def test_workers_end_with_their_loader() -> None:
    control = controller()
    loader = PrefetchingLoader(Positions(Noisy()), 0, control, workers=2, prefetch=2, pin=False)
    list(loader.draw(Progress(), control.plan(Progress())))
    assert len(multiprocessing.active_children()) == 2
    del loader
    assert not multiprocessing.active_children()


def test_workers_ignore_sigterm_but_from_their_trainer() -> None:
    control = controller()
    loader = PrefetchingLoader(Positions(Noisy()), 0, control, workers=2, prefetch=1, pin=False)
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
    Positions(Noisy()).__getitems__(range(5))
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
        whole, single = (Positions(each, seed=3).__getitems__(rows) for each in (dataset, OneByOne(dataset)))
        assert type(whole) is type(single)
        for one, other in zip(whole, single, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    for one, other in zip(
        *(evaluation_batches(each, World(), 6) for each in (dataset, OneByOne(dataset))), strict=True
    ):
        torch.testing.assert_close(list(one[0]), list(other[0]), rtol=0, atol=0)
        assert one[1] == other[1]
    own = Positions(dataset, collate=lambda rows: sum(float(row[2]) for row in rows))
    assert own.__getitems__(range(17)) == sum(range(17))  # a collation of one's own still sees the rows


@pytest.mark.parametrize("world", [1, 3, 60])
def test_evaluation_covers_every_row_once_over_all_ranks(world: int) -> None:
    parts = [list(evaluation_batches(Noisy(), World(rank=rank, size=world), 7)) for rank in range(world)]
    assert [int(row[0]) for part in parts for batch, rows in part for row in batch[:rows]] == list(range(50))
    assert len({len(part) for part in parts}) == 1
    assert all(1 <= len(batch) <= 7 for part in parts for batch, _ in part)


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    train, test = datasets.digits()
    bunch: Any = load_digits()
    ours = torch.cat([train.inputs, test.inputs]).flatten(1) * 16
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, bunch.data.tolist()))
    assert len(train) == Digits().train_size() == 1437
    assert torch.bincount(test.labels).min() > 20


def parquet(folder: Path, name: str, rows: int, column: str = "img") -> None:
    """A file in the Hugging Face layout with PNG images of one colour each."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    cells = []
    for row in range(rows):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (row, 2 * row, 255 - row)).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: cells, "label": [row % 10 for row in range(rows)]}), folder / name)


def test_parquet_folders_read_in_the_hugging_face_layout(tmp_path: Path) -> None:
    parquet(tmp_path / "plain_text", "train-00000-of-00002.parquet", 12)
    parquet(tmp_path / "plain_text", "train-00001-of-00002.parquet", 5, column="image")
    parquet(tmp_path / "plain_text", "test-00000-of-00001.parquet", 6)
    spec = Cifar10(path=str(tmp_path), augment=False)
    task = spec.build(None)
    assert spec.train_size() == len(task.train) == 17
    assert len(task.test) == 6
    assert len(task.probe) == 17
    image, label = task.train[3]
    mean, std = torch.tensor(datasets.Images.mean), torch.tensor(datasets.Images.std)
    assert torch.allclose(image.mean((1, 2)) * std + mean, torch.tensor([3, 6, 252]) / 255, atol=1e-5)
    assert label == 3
    assert len(Cifar10(path=str(tmp_path), subset=14).build(None).train) == 14
    assert task.model(task.train.batch(np.arange(4), seeds(0, np.arange(4)))[0]).shape == (4, 10)


def test_missing_or_wrong_parquet_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hf download uoft-cs/cifar10"):
        Cifar10(path=str(tmp_path / "nowhere")).build(None)
    parquet(tmp_path, "train.parquet", 3, column="picture")
    with pytest.raises(ConfigError, match="no Parquet file with 'test' in its name"):
        Cifar10(path=str(tmp_path)).build(None)
    parquet(tmp_path, "test.parquet", 3)
    with pytest.raises(ConfigError, match="needs the columns img"):
        Cifar10(path=str(tmp_path)).build(None)


def test_augmentation_is_a_shifted_and_mirrored_copy_uniform_over_its_choices() -> None:
    pixels = np.random.RandomState(0).randint(1, 256, (1, 3, 8, 8)).astype(np.uint8)
    images = datasets.Images(pixels, np.zeros(1, np.int64), augment=True)
    rows = 40_000
    cut = images._cut(np.zeros(rows, np.int64), seeds(0, np.arange(rows)))
    padded = np.pad(pixels[0], ((0, 0), (4, 4), (4, 4)))
    choices = [padded[:, y : y + 8, x : x + 8] for y in range(9) for x in range(9)]
    index = {view.tobytes(): k for k, image in enumerate(choices) for view in (image, image[:, :, ::-1])}
    counts = np.zeros(len(choices))
    for row in cut:
        counts[index[row.tobytes()]] += 1  # a KeyError would be an image that is no shift of the original
    assert counts.min() > 0
    assert ((counts - rows / 81) ** 2 / (rows / 81)).sum() < 130  # chi-square with 80 degrees of freedom, p ≈ 3e-4
    centre = np.stack([row for row in cut if index[row.tobytes()] == 40])
    mirrored = (centre == pixels[0][:, :, ::-1]).all((1, 2, 3)).mean()
    assert 0.4 < mirrored < 0.6


def test_plain_images_are_those_that_were_never_augmented() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (5, 3, 8, 6)).astype(np.uint8)
    labels, rows = np.arange(5), np.array([4, 0, 3])
    wanted = datasets.Images(pixels, labels, augment=False)
    for images in (datasets.Images(pixels, labels, augment=True).plain(), wanted.plain()):
        assert len(images) == 5
        for one, other in zip(images.batch(rows, seeds(1, rows)), wanted.batch(rows, seeds(2, rows)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("level", "vocabulary"), [("byte", 256), ("character", 5)])
def test_text_becomes_windows_and_their_successors(tmp_path: Path, level: Any, vocabulary: int) -> None:
    text = "abcdé" * 200
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    spec = Text(path=str(tmp_path / "a.txt"), level=level, length=16)
    task = spec.build(None)
    assert len(task.train) == spec.train_size()
    x, y = task.train[3]
    assert torch.equal(x[1:], y[:-1])
    assert torch.equal(task.train[4][0][0], y[-1])
    xs, ys = task.train.batch(np.array([3, 4]), seeds(0, np.arange(2)))
    assert torch.equal(xs[0], x)
    assert torch.equal(ys[0], y)
    assert task.model(xs).shape == (2, 16, vocabulary)


def test_text_comes_from_folders_and_by_default_from_pythons_own_sources(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "c.md"):
        (tmp_path / name).write_text(name * 100)
    assert files.read_text(tmp_path, "*.py") == b"a.py" * 100 + b"\n" + b"b.py" * 100
    with pytest.raises(ConfigError, match=r"task\.pattern"):
        files.read_text(tmp_path, "*.rst")
    with pytest.raises(ConfigError, match="too few"):
        Text(path=str(tmp_path / "a.py"), length=4096).build(None)
    assert b"import" in files.read_text(None, "*")[:100_000]


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (Softmax(), 64 * 10 + 10),
        (MLP(hidden=[32]), 64 * 32 + 32 + 32 * 10 + 10),
        (ResNet(kind="resnet8", norm="batch"), 78_042),
        (ResNet(kind="resnet20", norm="batch"), 272_474),
        (ResNet(kind="resnet18", norm="batch"), 11_173_962),
    ],
)
def test_models_have_the_published_number_of_parameters(spec: Any, parameters: int) -> None:
    channels = 3 if isinstance(spec, ResNet) else 1
    side = 32 if isinstance(spec, ResNet) else 8
    model = spec.build(Images(channels=channels, height=side, width=side, classes=10))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if spec.kind != "resnet18":
        assert model(torch.randn(2, channels, side, side)).shape == (2, 10)


def test_the_gpt_never_looks_ahead() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, width=16, heads=2).build(Tokens(length=8, vocabulary=11))
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    one, other = model(tokens), model(changed)
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.equal(one[:, 5:], other[:, 5:])


def test_models_that_do_not_fit_the_inputs_are_refused() -> None:
    images, tokens = Images(channels=1, height=8, width=8, classes=10), Tokens(length=8, vocabulary=11)
    with pytest.raises(ConfigError, match=r"model\.kind=gpt needs task\.kind=text"):
        GPT().build(images)
    with pytest.raises(ConfigError, match=r"model\.kind=mlp needs images"):
        MLP().build(tokens)
    with pytest.raises(ConfigError, match="does not divide"):
        GPT(width=10, heads=4).build(tokens)


def test_an_order_over_a_billion_samples_feeds_a_loader() -> None:
    class Billion:
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(index)

    control = Controller(growth=exponential(64, 2, 256), budget=budget(samples=4096), epoch=10**9)
    rows = drawn(lambda rank: DirectLoader(Positions(Billion()), rank), control)
    assert len({int(row) for row in islice(rows, 4096)}) == 4096
