"""Built-in data, all real: digits, CIFAR-10 from Parquet, text; arrays in memory that make whole batches at once."""

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distgrow.order import Int64s, UInt64s, seeds
from distgrow.spec import ConfigError

Example = tuple[Tensor, Tensor]
Bytes = npt.NDArray[np.uint8]


class Arrays:
    """Inputs (n, …) and labels (n,) in memory."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Example:
        return self.inputs[index], self.labels[index]

    def batch(self, indices: Int64s, seeds: UInt64s) -> Example:
        """The collated rows `indices`."""
        rows = torch.from_numpy(indices)
        return self.inputs[rows], self.labels[rows]


def digits() -> tuple[Arrays, Arrays]:
    """scikit-learn's 8×8 digits as (1, 8, 8) images in 0 … 1: 1,437 to train on and 360 to test on."""
    package = find_spec("sklearn")  # its file is read directly: importing scikit-learn takes two seconds
    assert package is not None and package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.float32)
    order = np.random.RandomState(0).permutation(len(table))
    images = torch.from_numpy(table[order, :64] / 16.0).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[order, 64]).long()
    return Arrays(images[:1437], labels[:1437]), Arrays(images[1437:], labels[1437:])


class Images:
    """uint8 images (n, 3, h, w), normalised as they are drawn; augmented ones are shifted and mirrored at random."""

    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  #: of CIFAR-10's training set
    pad = 4  #: pixels that an augmented image may be shifted by

    def __init__(self, pixels: Bytes, labels: Int64s, *, augment: bool) -> None:
        edges = ((0, 0), (0, 0), (self.pad, self.pad), (self.pad, self.pad))
        self.height, self.width = pixels.shape[2:]
        self.pixels, self.labels, self.augment = (np.pad(pixels, edges) if augment else pixels), labels, augment
        self._scale = 1 / (255 * torch.tensor(self.std).view(3, 1, 1))
        self._shift = -torch.tensor(self.mean).view(3, 1, 1) / torch.tensor(self.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        seed = seeds(int(torch.randint(2**62, ())), [index]) if self.augment else seeds(0, [0])
        image, label = self.batch(np.array([index]), seed)
        return image[0], label[0]

    def batch(self, indices: Int64s, seeds: UInt64s) -> Example:
        """The collated rows `indices`, shifted by up to 4 pixels and mirrored as each row's seed says."""
        pixels = self._cut(indices, seeds) if self.augment else self.pixels[indices]
        images = torch.from_numpy(pixels).float().mul_(self._scale).add_(self._shift)
        return images, torch.from_numpy(self.labels[indices])

    def _cut(self, indices: Int64s, seeds: UInt64s) -> Bytes:
        places = np.uint64(2 * self.pad + 1)
        downs, rights, mirrored = seeds % places, seeds // places % places, (seeds >> np.uint64(63)).astype(bool)
        out = np.empty((len(indices), 3, self.height, self.width), np.uint8)
        for row, (index, down, right, mirror) in enumerate(zip(indices, downs, rights, mirrored, strict=True)):
            image = self.pixels[index, :, int(down) : int(down) + self.height, int(right) : int(right) + self.width]
            out[row] = image[:, :, ::-1] if mirror else image
        return out


def parquet_files(folder: Path, part: str) -> list[Path]:
    """The Parquet files of one part ("train" or "test") below a folder, or a ValueError that says how to get them."""
    files = sorted(file for file in folder.rglob("*.parquet") if part in file.name)
    if not files:
        raise ConfigError(
            f"task.path={folder}: no Parquet file with '{part}' in its name there; get the data with "
            "'hf download uoft-cs/cifar10 --repo-type dataset --local-dir data/cifar10' (extra: hf) "
            "and set task.path=data/cifar10"
        )
    return files


def parquet_rows(files: list[Path]) -> int:
    """Rows of Parquet files, from their footers alone."""
    parquet, rows = _parquet(), 0
    for file in files:
        with _reading(file):
            rows += parquet.ParquetFile(file).metadata.num_rows
    return rows


def parquet_images(files: list[Path], *, limit: int | None, augment: bool) -> Images:
    """Images and labels in the Hugging Face layout: a struct of encoded `bytes`, and an integer."""
    pixels: list[Bytes] = []
    labels: list[int] = []
    for file in files:
        with _reading(file):
            table = _parquet().read_table(file)
        image_column = next((c for c in ("img", "image") if c in table.column_names), None)
        if image_column is None or "label" not in table.column_names:
            raise ConfigError(f"{file}: needs the columns img (or image) and label; it has {table.column_names}")
        cells = table.column(image_column).to_pylist()[: None if limit is None else limit - len(pixels)]
        with _reading(file):
            pixels += [_pixels(cell["bytes"]) for cell in cells]
        labels += table.column("label").to_pylist()
    if not pixels:
        raise ConfigError(f"{', '.join(map(str, files))}: no rows")
    if len(shapes := {image.shape[1:] for image in pixels}) > 1:
        raise ConfigError(f"{files[0].parent}: images of several sizes, {sorted(shapes)}; make them all one size")
    return Images(np.stack(pixels), np.asarray(labels[: len(pixels)], np.int64), augment=augment)


def _pixels(encoded: bytes) -> Bytes:
    """An encoded image as (3, height, width)."""
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).transpose(2, 0, 1)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """pyarrow's and pillow's complaints about a file, told by its name."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read as Parquet with encoded images: {error}") from None


def _parquet() -> Any:
    try:
        import pyarrow.parquet
        from PIL import Image  # noqa: F401  both come with the same extra
    except ImportError as error:
        raise ConfigError(
            f"task.kind=cifar10 needs the extra 'vision': pip install 'distgrow[vision]' ({error})"
        ) from None
    return pyarrow.parquet


class Tokens:
    """Non-overlapping windows of a token stream: inputs (length,) and the same shifted by one."""

    def __init__(self, stream: Int64s, length: int) -> None:
        self.stream, self.length = torch.from_numpy(stream), length
        self._offsets = torch.arange(length + 1)

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.length

    def __getitem__(self, index: int) -> Example:
        window = self.stream[index * self.length : (index + 1) * self.length + 1]
        return window[:-1], window[1:]

    def batch(self, indices: Int64s, seeds: UInt64s) -> Example:
        """The collated windows `indices`."""
        windows = self.stream[torch.from_numpy(indices)[:, None] * self.length + self._offsets]
        return windows[:, :-1], windows[:, 1:]


def read_text(path: Path | None, pattern: str) -> bytes:
    """A file, or all files below a folder that match; without a path, Python's own standard library."""
    if path is None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    elif path.is_dir():
        files = _matching(path, pattern)
    elif path.is_file():
        files = [path]
    else:
        raise ConfigError(
            f"task.path={path} is neither a file nor a folder; give a text file or a folder, or leave it out"
        )
    if not files:
        raise ConfigError(f"task.path={path}: no file there matches task.pattern={pattern!r}")
    try:
        return b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise ConfigError(f"task.path={path}: {error.filename} cannot be read: {error.strerror}") from None


def _matching(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(file for file in folder.rglob(pattern) if file.is_file())
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"task.pattern={pattern!r}: {error}; it must read like '*.txt' or 'notes/*.md'") from None


def tokens(text: bytes, *, characters: bool) -> tuple[Int64s, int]:
    """The token stream of a text and the size of its vocabulary: bytes, or the characters that occur."""
    if not characters:
        return np.frombuffer(text, np.uint8).astype(np.int64), 256
    points = np.frombuffer(text.decode("utf-8", errors="replace").encode("utf-32-le"), np.uint32)
    alphabet, stream = np.unique(points, return_inverse=True)
    return stream.astype(np.int64), len(alphabet)
