"""Built-in data sets hold the rows they say, and refuse folders that hold others."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distgrow.core.errors import ConfigError
from distgrow.core.order import seeds
from distgrow.data import datasets, files
from distgrow.tasks.builtin import Cifar10, Digits, Text


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
    mean, std = torch.tensor(datasets.CIFAR10_MEAN), torch.tensor(datasets.CIFAR10_STD)
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
    as_they_are = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
    images = datasets.Images(pixels, np.zeros(1, np.int64), augment=True, **as_they_are)
    rows = 40_000
    cut = images.batch(np.zeros(rows, np.int64), seeds(0, np.arange(rows)))[0].round().byte().numpy()
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
