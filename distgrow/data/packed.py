"""Packed: documents of any length, laid end to end and cut into windows of one length, with their boundaries."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, Order, UInt64s, seeds
from distgrow.core.window_order import WindowOrder
from distgrow.data.dataset import Gathered, Ordered, check_rows_by_number, facts_of, rows_of
from distgrow.data.sharded import Files

#: Labels that losses leave out, as torch's cross_entropy does.
IGNORED = -100
_RUN = 64  # windows in a row that are read together if the documents lie in files
_BLOCK = 4096  # documents that are counted at a time


class Packed(Gathered, Ordered):
    """Windows of tokens. Every token but the few that fill no last window comes once an epoch.

    A window is a dict: `input_ids`, `labels`, `position_ids`, `document_ids`, each int64 (length,). The documents keep
    their order, so window k is always the same; windows are shuffled.
    """

    def __init__(
        self,
        documents: Any,
        length: int,
        *,
        column: str | None = None,
        end: int | None = None,
        vocabulary: int | None = None,
        across: bool = False,
        shifted: bool = True,
        window: int = 4096,
        lengths: npt.ArrayLike | None = None,
    ) -> None:
        """Count the tokens of all documents, unless `lengths` are given; 8 bytes a document stay in memory.

        Args:
            documents: A map-style data set of token sequences, or of dicts that hold one.
            length: Tokens of a window.
            column: The key of the tokens, if documents are dicts.
            end: A token that is put after each document. None: none.
            vocabulary: If given, a token that is no number below it is refused.
            across: Whether the last token of a document has the first of the next one as its label. Without it, its
                label is −100.
            shifted: Whether labels are the next tokens; False: the same tokens, for models that shift them.
            window: Windows that are shuffled together, if the documents are Files.
            lengths: Tokens of each document, without `end`.

        Raises:
            ConfigError: There are too few tokens, or no documents by number.
        """
        check_rows_by_number(documents, "documents")
        for name, value in (("length", length), ("window", window)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: allowed are whole numbers from 1")
        for name, value in (("end", end), ("vocabulary", vocabulary)):
            if value is not None and (type(value) is not int or value < 0):
                raise ConfigError(f"{name}={value!r}: allowed are whole numbers from 0")
        self.documents, self.length, self.column, self.end = documents, length, column, end
        self.vocabulary = vocabulary
        self.across, self.shifted, self.window = across, shifted, window
        counts = _whole(lengths) if lengths is not None else np.asarray(self._counted(), np.int64)
        if counts.shape != (len(documents),) or (counts < 0).any():
            raise ConfigError(f"lengths: {counts.shape} of them, but there are {len(documents)} documents")
        self._ends = np.cumsum(counts + (end is not None))
        self._count = max(0, (int(self._ends[-1]) if len(counts) else 0) - shifted) // length
        if not self._count:
            raise ConfigError(
                f"length={length}: all {len(documents)} documents together have {self._ends[-1:].sum()} tokens, too "
                "few for one window; give more of them, or a smaller length"
            )

    def __len__(self) -> int:
        return self._count

    def order(self, seed: int) -> Callable[[Any], tuple[Int64s, Int64s]]:
        """See Ordered. Windows of files are shuffled in pieces, so that few files are open at a time."""
        if not isinstance(self.documents, Files):
            return Order(n=self._count, seed=seed)
        whole, rest = divmod(self._count, _RUN)
        return WindowOrder(sizes=(_RUN,) * whole + (rest,) * (rest > 0), window=self.window, seed=seed)

    def facts(self) -> dict[str, int]:
        """See Ordered."""
        digest = hashlib.sha256(self._ends.tobytes() + repr((self.length, self.shifted, self.window)).encode()).digest()
        return {"as digest of the documents' lengths": int.from_bytes(digest[:6], "big"), **facts_of(self.documents)}

    def rows(self, indices: Int64s, seeds: UInt64s) -> list[Any]:
        """See Gathered."""
        begins, reach = indices * self.length, self.length + self.shifted
        first = np.searchsorted(self._ends, begins, side="right")
        last = np.searchsorted(self._ends, begins + reach - 1, side="right")
        wanted = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        tokens = dict(zip(wanted.tolist(), self._tokens(wanted), strict=True))
        spans = zip(begins.tolist(), first.tolist(), last.tolist(), strict=True)
        return [self._window(begin, begin + reach, range(a, b + 1), tokens) for begin, a, b in spans]

    def _counted(self) -> list[int]:
        """Return the lengths of all documents, without what is put after each."""
        total, added = len(self.documents), self.end is not None
        blocks = (np.arange(at, min(at + _BLOCK, total)) for at in range(0, total, _BLOCK))
        return [len(each) - added for block in blocks for each in self._tokens(block)]

    def _tokens(self, documents: Int64s) -> list[Int64s]:
        """Return the tokens of some documents."""
        rows = rows_of(self.documents, documents, seeds(0, documents))
        try:
            found = [np.asarray(row if self.column is None else row[self.column]) for row in rows]
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"column={self.column!r}: a document is a {type(rows[0]).__name__} ({error!r})") from None
        for each in found:
            if each.ndim != 1 or (each.size and each.dtype.kind not in "iu"):
                raise ConfigError(
                    f"column={self.column!r}: a document is no sequence of token numbers but {each.dtype} of shape "
                    f"{each.shape}; tokenize it (Files(…, transform=…)), or name the column"
                )
            if self.vocabulary is not None and each.size and not 0 <= each.min() <= each.max() < self.vocabulary:
                raise ConfigError(
                    f"vocabulary={self.vocabulary}: a document has tokens of {each.min()} to {each.max()}; raise it"
                )
        end = [] if self.end is None else [self.end]
        return [np.concatenate([each, end]).astype(np.int64) for each in found]

    def _window(self, begin: int, stop: int, documents: range, tokens: dict[int, Int64s]) -> dict[str, torch.Tensor]:
        """Return the tokens begin … stop − 1 of all documents laid end to end, with their boundaries."""
        parts: list[Int64s] = []
        for number in documents:
            whole, end = tokens[number], int(self._ends[number])
            start = end - len(whole)
            if start != (int(self._ends[number - 1]) if number else 0):
                raise ConfigError(
                    f"document {number} has another length now, {len(whole)} tokens; give it back its own"
                )
            parts.append(whole[max(0, begin - start) : stop - start])
        flat = np.concatenate(parts)
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        owner = np.unique(owner, return_inverse=True)[1]  # documents without tokens are not counted
        opens = np.flatnonzero(np.diff(owner, prepend=-1))
        places = np.arange(len(flat)) - opens[owner]
        ids = slice(0, self.length)
        labels = flat[1:].copy() if self.shifted else flat.copy()
        if not self.across:
            labels[(np.diff(owner) > 0) if self.shifted else (places == 0) & (np.arange(len(flat)) > 0)] = IGNORED
        columns = {"input_ids": flat[ids], "labels": labels, "position_ids": places[ids], "document_ids": owner[ids]}
        return {name: torch.from_numpy(column.astype(np.int64)) for name, column in columns.items()}


def _whole(lengths: npt.ArrayLike) -> Int64s:
    counts = np.asarray(lengths)
    if counts.size and counts.dtype.kind not in "iu":
        raise ConfigError(f"lengths are {counts.dtype}; allowed are whole numbers of tokens")
    return counts.astype(np.int64)
