"""Files of raw data: which files there are, how many samples they hold, and their content as arrays. Loads no torch."""

import io
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s

Bytes = npt.NDArray[np.uint8]


def parquet_files(folder: Path, part: str) -> list[Path]:
    """Return the Parquet files of one part ("train" or "test") below a folder.

    Raises:
        ConfigError: if there are none. It says how to get them.
    """
    files = sorted(file for file in folder.rglob("*.parquet") if part in file.name)
    if not files:
        raise ConfigError(
            f"task.path={folder}: no Parquet file with '{part}' in its name there; get the data with "
            "'hf download uoft-cs/cifar10 --repo-type dataset --local-dir data/cifar10' (extra: hf) "
            "and set task.path=data/cifar10"
        )
    return files


def parquet_rows(files: list[Path]) -> int:
    """Count the rows of Parquet files from their footers alone."""
    parquet, rows = _parquet(), 0
    for file in files:
        with _reading(file):
            rows += parquet.ParquetFile(file).metadata.num_rows
    return rows


def parquet_images(files: list[Path], *, limit: int | None, label: str = "label") -> tuple[Bytes, Int64s]:
    """Read images and labels from Parquet files in the layout of Hugging Face.

    Args:
        files: Files with a struct of encoded `bytes` and an integer label in each row.
        limit: Number of rows to read; None reads all.
        label: Name of the label's column.

    Returns:
        Images (n, 3, height, width) as uint8, and labels (n,).
    """
    pixels: list[Bytes] = []
    labels: list[int] = []
    for file in files:
        with _reading(file):
            table = _parquet().read_table(file)
        image_column = next((c for c in ("img", "image") if c in table.column_names), None)
        if image_column is None or label not in table.column_names:
            raise ConfigError(f"{file}: needs the columns img (or image) and {label}; it has {table.column_names}")
        cells = table.column(image_column).to_pylist()[: None if limit is None else limit - len(pixels)]
        with _reading(file):
            pixels += [_pixels(cell["bytes"]) for cell in cells]
        labels += table.column(label).to_pylist()
    if not pixels:
        raise ConfigError(f"{', '.join(map(str, files))}: no rows")
    if len(shapes := {image.shape[1:] for image in pixels}) > 1:
        raise ConfigError(f"{files[0].parent}: images of several sizes, {sorted(shapes)}; make them all one size")
    return np.stack(pixels), np.asarray(labels[: len(pixels)], np.int64)


def _pixels(encoded: bytes) -> Bytes:
    """Decode an image as (3, height, width)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).transpose(2, 0, 1)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn errors of pyarrow and pillow into a ConfigError that names the file."""
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


def read_text(path: Path | None, pattern: str) -> bytes:
    """Read a file, or all files below a folder that match `pattern`. Without a path, read Python's standard library."""
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
    """Return the tokens of a text and the size of its vocabulary. Tokens are bytes, or the characters that occur."""
    if not characters:
        return np.frombuffer(text, np.uint8).astype(np.int64), 256
    points = np.frombuffer(text.decode("utf-8", errors="replace").encode("utf-32-le"), np.uint32)
    alphabet, stream = np.unique(points, return_inverse=True)
    return stream.astype(np.int64), len(alphabet)
