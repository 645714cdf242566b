"""Tokenizers: make tokens of texts and texts of tokens, by bytes or by a file of Hugging Face; knows no model."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s

#: The name of the tokenizer that needs no file.
BYTES = "bytes"


class Tokenizer(Protocol):
    """Make tokens of texts, and texts of tokens."""

    size: int
    """Tokens that there are: every one is a number below it."""
    digest: str
    """Differs between tokenizers that make other tokens."""

    def encode(self, texts: Sequence[bytes]) -> list[Int64s]:
        """Return the tokens of each text, which is UTF-8."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of some tokens; tokens that the tokenizer does not know are left out."""
        ...


class Bytes:
    """Take each byte of a text as a token."""

    size, digest = 256, BYTES

    def encode(self, texts: Sequence[bytes]) -> list[Int64s]:
        """See Tokenizer."""
        return [np.frombuffer(text, np.uint8).astype(np.int64) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """See Tokenizer. Bytes that are no UTF-8 become a replacement character."""
        return bytes(token for token in tokens if token < self.size).decode("utf-8", errors="replace")


class FromFile:
    """Tokenize by a tokenizer.json, as Hugging Face's tokenizers write it. Special tokens are not added."""

    def __init__(self, path: Path, key: str) -> None:
        """Read the file; the name `key` is for messages.

        Raises:
            ConfigError: There is none, it does not parse, or the package is not installed.
        """
        tokenizers = _package(key, path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{key}={path}: {file} cannot be read ({error.strerror}); allowed are {BYTES}, and a tokenizer.json of "
                "Hugging Face or the folder that holds it"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises Exception itself
            raise ConfigError(
                f"{key}={path}: {file} does not parse as a tokenizer.json of Hugging Face ({error}); save it by "
                f"tokenizer.save(…) of the package tokenizers, or use {key}={BYTES}"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.size, self.digest = 1 + max(known, default=-1), hashlib.sha256(content).hexdigest()[:16]

    def encode(self, texts: Sequence[bytes]) -> list[Int64s]:
        """See Tokenizer. Bytes that are no UTF-8 become a replacement character before."""
        plain = [text.decode("utf-8", errors="replace") for text in texts]
        return [
            np.asarray(each.ids, np.int64) for each in self._tokenizer.encode_batch(plain, add_special_tokens=False)
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """See Tokenizer."""
        return self._tokenizer.decode([token for token in tokens if token < self.size], skip_special_tokens=False)


def tokenizer_of(name: str, key: str) -> Tokenizer:
    """Return the tokenizer that the value `name` of `key` stands for. Raise ConfigError if there is none."""
    return Bytes() if name == BYTES else FromFile(Path(name), key)


def _package(key: str, path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"{key}={path} needs the extra 'tokenizers': pip install 'distgrow[tokenizers]', or {key}={BYTES}, which "
            f"needs none ({error})"
        ) from None
    return tokenizers
