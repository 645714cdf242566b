"""Texts: documents as bytes, from text files or from a column of Parquet, Arrow and JSONL files. Loads no torch."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distgrow.core.errors import ConfigError
from distgrow.data.shards import FORMATS

#: Rows that are read at a time.
_ROWS = 1024


class Texts(Protocol):
    """Give documents as bytes, in an order of their own."""

    digest: str
    """Differs between documents that are others."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield each document."""
        ...

    def size(self) -> int:
        """Count the bytes of all documents."""
        ...


class TextFiles:
    """Text files: each is a document."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        told = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self._size, self.digest = sum(size for _, size, _ in told), _digest(told)

    def __iter__(self) -> Iterator[bytes]:
        """See Texts."""
        for file in self._files:
            try:
                yield file.read_bytes()
            except OSError as error:
                raise ConfigError(f"{file} cannot be read: {error.strerror}") from None

    def size(self) -> int:
        """See Texts."""
        return self._size


class TextColumn:
    """A column of Parquet, Arrow or JSONL files: each row is a document."""

    def __init__(self, path: str, column: str) -> None:
        from distgrow.data.sharded import Files

        self._files, self._column = Files(path, columns=[column], cache_gib=0), column
        self.digest = _digest([column, *((shard.uri, shard.stamp) for shard in self._files.shards)])

    def __iter__(self) -> Iterator[bytes]:
        """See Texts."""
        total = len(self._files)
        for first in range(0, total, _ROWS):
            numbers = np.arange(first, min(first + _ROWS, total))
            for number, row in enumerate(self._files.rows(numbers, numbers.astype(np.uint64)), first):
                yield self._encoded(row[self._column], number)

    def size(self) -> int:
        """See Texts."""
        return sum(map(len, self))

    def _encoded(self, value: Any, number: int) -> bytes:
        if isinstance(value, str):
            return value.encode("utf-8", errors="replace")
        if not isinstance(value, bytes):
            raise ConfigError(
                f"column={self._column!r}: row {number} holds a {type(value).__name__}, no text; name the column of "
                "texts, or leave out the tokenizer if the column has token numbers"
            )
        return value


def texts_of(path: str | None, column: str) -> Texts:
    """Return the documents of a path; None: the sources of Python's standard library.

    Parquet, Arrow and JSONL files have a document in each row, all other files are documents. A folder stands for its
    files of the first kind; if it has none, for all .txt and .md files below it.

    Raises:
        ConfigError: Nothing is there.
    """
    if path is None:
        return TextFiles(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    if "://" in path or Path(path).suffix.lower() in FORMATS:
        return TextColumn(path, column)
    place = Path(path)
    if place.is_dir() and any(file.suffix.lower() in FORMATS for file in place.rglob("*")):
        return TextColumn(path, column)
    found = _matching(place)
    if not found:
        raise ConfigError(
            f"path={path}: no file there; give a text file, a pattern such as notes/*.txt, a folder with .txt or .md "
            f"files, or files of rows with a column of texts ({', '.join(FORMATS)})"
        )
    return TextFiles(found)


def _matching(place: Path) -> list[Path]:
    """Return the text files of a file, a folder or a pattern, sorted."""
    if place.is_file():
        return [place]
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix.lower() in (".txt", ".md") and file.is_file())
    if not any(mark in place.name for mark in "*?["):
        return []
    return sorted(file for file in place.parent.glob(place.name) if file.is_file())


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", errors="replace")).hexdigest()[:16]
