"""Tokenized: documents of tokens, made of texts once on each host and then mapped by all its processes."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, UInt64s
from distgrow.data.dataset import Gathered
from distgrow.data.texts import Texts
from distgrow.data.tokenizer import Tokenizer

#: Bytes of texts that are tokenized together.
_TOGETHER = 2**22


class Tokenized(Gathered):
    """Documents of tokens. A row is one document's tokens."""

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        *,
        part: tuple[float, float] = (0.0, 1.0),
        folder: str | Path | None = None,
    ) -> None:
        """Map the tokens, after tokenizing the texts if no process of this host has done so before.

        Args:
            texts: The documents.
            tokenizer: What makes their tokens.
            part: Where the documents begin and end, as shares of all bytes. A document across such a place is cut
                there, between two characters.
            folder: Where the tokens are kept. None: a folder of yours in the temporary folder.

        Raises:
            ConfigError: The texts cannot be read, or the folder cannot be written.
        """
        home = Path(folder) if folder else Path(tempfile.gettempdir()) / f"distgrow-{os.getuid()}" / "tokens"
        told = repr((texts.digest, tokenizer.digest, part)).encode()
        name = home / hashlib.sha256(told).hexdigest()[:32]
        self._file, index = name.with_suffix(".tokens"), name.with_suffix(".npz")
        try:
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(name.with_suffix(".lock")):
                if not index.is_file():
                    _write(self._file, index, texts, tokenizer, part)
            with np.load(index) as kept:
                self.lengths, self.bytes = kept["lengths"], int(kept["bytes"])
        except OSError as error:
            raise ConfigError(
                f"cache={home}: tokens cannot be kept there ({error.strerror or error}); give another folder"
            ) from None
        self._ends, self._kind = np.cumsum(self.lengths), _kind(tokenizer)
        self._map: Any = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Return the number of all tokens."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the map behind: another process makes its own."""
        return {**self.__dict__, "_map": None}

    def rows(self, indices: Int64s, seeds: UInt64s) -> list[Any]:
        """See Gathered."""
        if self._map is None:
            self._map = np.memmap(self._file, self._kind, "r") if self.tokens else np.zeros(0, self._kind)
        ends = self._ends[indices]
        begins = ends - self.lengths[indices]
        return [np.asarray(self._map[a:b]) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]


def _kind(tokenizer: Tokenizer) -> Any:
    return np.uint16 if tokenizer.size <= 2**16 else np.uint32


def _write(file: Path, index: Path, texts: Texts, tokenizer: Tokenizer, part: tuple[float, float]) -> None:
    """Tokenize, and keep tokens and lengths; the index last, so that what it belongs to is whole."""
    lengths, size, partial = list[int](), 0, file.with_suffix(".partial")
    with partial.open("wb") as stream:
        for documents in _groups(_cut(texts, part)):
            found = tokenizer.encode(documents)
            lengths += map(len, found)
            size += sum(map(len, documents))
            stream.write(np.concatenate(found).astype(_kind(tokenizer)).tobytes())
    partial.replace(file)
    whole = file.with_suffix(".partial.npz")
    np.savez(whole, lengths=np.asarray(lengths, np.int64), bytes=np.int64(size))
    whole.replace(index)


def _cut(texts: Texts, part: tuple[float, float]) -> Iterator[bytes]:
    """Yield the documents between two shares of all bytes."""
    if part == (0.0, 1.0):
        yield from texts
        return
    total, at = texts.size(), 0
    first, last = (int(share * total) for share in part)
    for document in texts:
        a, b = (_between(document, place - at) for place in (first, last))
        at += len(document)
        if a < b:
            yield document[a:b]


def _between(document: bytes, place: int) -> int:
    """Return the first place from `place` on at which a character of UTF-8 begins, within the document."""
    place = min(max(place, 0), len(document))
    while 0 < place < len(document) and document[place] & 0xC0 == 0x80:
        place += 1
    return place


def _groups(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Yield documents in lists of about `_TOGETHER` bytes."""
    waiting, size = list[bytes](), 0
    for document in documents:
        waiting.append(document)
        size += len(document)
        if size >= _TOGETHER:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting
