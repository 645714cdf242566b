"""IterableStream: a data set that can only be read from its beginning, along the endless stream of samples.

Every rank reads the same stream and keeps the rows of its own positions. So a run depends neither on the number of
ranks nor on the micro-batch.
"""

import copy
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from distgrow.core.errors import ConfigError, RunError
from distgrow.core.order import mix_int, seeds
from distgrow.data.dataset import has_length, size_of
from distgrow.data.seeding import kept_generators, seed_generators

#: What a checkpoint holds of a stream, in plain values: `position` of the next row, lengths of the finished `passes`,
#: `offset` in the present one; and if the data set has a state, its state `since` rows before, with their `digests`.
State = dict[str, Any]
_BEGINNING: State = {"position": 0, "passes": [], "offset": 0, "dataset": None, "since": 0, "digests": []}
_SALT = 0x57EA
_COMPARED = 64  # rows, at most, that show whether a state is exact


class IterableStream:
    """An iterable data set seen along the endless sample stream: one pass after the other, in its own order.

    What the data set draws from Python's, numpy's and torch's generators follows from the seed and the row's position;
    what it draws as a pass begins, from the seed and the pass. `set_epoch(pass)` is called before each pass, if it has
    that.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        recall: int = 2,
    ) -> None:
        """Begin before the first row. Nothing is read yet.

        Args:
            dataset: The data set.
            seed: Of random numbers.
            collate: Makes a batch of a list of rows. None: torch's.
            recall: Batches whose rows are kept, as they may be asked for again.
        """
        self.by_state = has_state(dataset)  #: the data set's own state is used; else a resume reads all rows again
        self.dataset = copy.deepcopy(dataset) if self.by_state else dataset  # its state is then this stream's alone
        self.seed, self.collate, self.recall = seed, collate or default_collate, recall
        self.length = len(dataset) if has_length(dataset) else None
        self.size = size_of(dataset)  #: rows of a pass; ENDLESS without a length
        self._numbers = np.random.MT19937(0)
        self._unread = self._own_state()
        self._begin_at(_BEGINNING)

    def __getitems__(self, positions: Sequence[int]) -> Any:
        """Return the collated rows at `positions`. Positions ahead are read up to; those behind are read again."""
        if not positions:
            return None
        first, stop = min(positions), max(positions) + 1
        if first < self._kept_from():
            self._begin_at(self._mark_before(first))
        self._starts.append(first)
        with kept_generators(numbers=self._numbers):
            while self._at < stop:
                self._read(stop)
            found = [self._rows[position - self._kept_from()] for position in positions]
            seed_generators(int(seeds(self.seed, [stop - 1])[0]))
            batch = self.collate(found)
        self._forget()
        self._marks.append({**self._place(), "dataset": self._own_state(), "since": 0, "digests": []})
        return batch

    # ── the state ───────────────────────────────────────────────────────────────────────────────────────────────

    def state(self) -> State:
        """Return what brings back the rows from here on.

        The data set's state is an earlier one. So whoever loads it sees by the rows in between whether it is exact:
        shuffle buffers are mostly not part of a state.
        """
        if self._resumed is not None:
            return self._resumed  # nothing was read since
        mark = self._marks[-2] if len(self._marks) > 1 else self._marks[0]
        since = self._at - mark["position"]
        if not self.by_state or mark["passes"] != self.passes or since > len(self._rows):
            return {**self._place(), "dataset": None, "since": 0, "digests": []}
        rows = list(self._rows)[len(self._rows) - min(since, _COMPARED) :] if since else []
        return {**self._place(), "dataset": mark["dataset"], "since": since, "digests": digests(rows)}

    def _place(self) -> State:
        return {"position": self._at, "passes": list(self.passes), "offset": self._offset}

    def restore(self, state: State) -> None:
        """Go on from a state, of this or another process.

        Raises:
            ConfigError: The data set does not take its own state.
        """
        self._begin_at(state)

    def _own_state(self) -> Any:
        if not self.by_state:
            return None
        try:
            return copy.deepcopy(self.dataset.state_dict())
        except Exception as error:  # whatever a user's code raises
            raise ConfigError(
                f"the training stream gives no state: state_dict raised {type(error).__name__}: {error}; mend it, or "
                "remove it: a resume then reads the stream again"
            ) from error

    def _begin_at(self, state: State) -> None:
        """Forget all rows, and stand where a state was taken."""
        self._at, self.passes, self._offset = state["position"], list(state["passes"]), state["offset"]
        self._rows = deque[Any]()  # of the positions up to `_at`
        self._starts = deque[int](maxlen=self.recall)
        self._marks = deque[State]([state], maxlen=self.recall + 1)
        self._iterator: Iterator[Any] | None = None
        self._resumed: State | None = state  # until the next row is read

    def _mark_before(self, position: int) -> State:
        """Return the latest state that stands before a position."""
        before = [mark for mark in self._marks if mark["position"] <= position]
        return before[-1] if before else _BEGINNING

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _kept_from(self) -> int:
        """Return the position of the first row that is kept."""
        return self._at - len(self._rows)

    def _forget(self) -> None:
        """Drop the rows before the oldest of the last few batches."""
        while self._rows and self._kept_from() < min(self._starts):
            self._rows.popleft()

    def _read(self, stop: int) -> None:
        """Read rows up to position `stop`, or to the end of the pass."""
        if self._iterator is None:
            self._iterator = self._opened()
        for seed in seeds(self.seed, np.arange(self._at, stop)).tolist():
            seed_generators(seed)
            try:
                row = next(self._iterator)
            except StopIteration:
                self._end_pass()
                return
            if self.length is not None and self._offset >= self.length:
                raise RunError(
                    f"the training stream goes on after {self.length} rows, which its len() is; mend its __len__"
                )
            self._rows.append(row)
            self._at, self._offset = self._at + 1, self._offset + 1

    def _opened(self) -> Iterator[Any]:
        """Return the iterator of the present pass, at its `offset`."""
        state, self._resumed = self._resumed, None
        if state is not None and self.by_state and state["dataset"] is not None:
            iterator, found = self._begun(state["dataset"], state["since"])
            if digests(found) == state["digests"]:
                return iterator
            self.by_state = False  # it does not bring back the rows that followed
        return self._begun(self._unread, self._offset)[0]

    def _begun(self, own_state: Any, count: int) -> tuple[Iterator[Any], list[Any]]:
        """Return an iterator of the present pass that stands here after it has read `count` rows, and these."""
        number = len(self.passes)
        if callable(set_epoch := getattr(self.dataset, "set_epoch", None)):
            set_epoch(number)
        if own_state is not None:
            self._load(own_state)
        seed_generators(mix_int(mix_int(self.seed, _SALT), number))
        iterator, found = iter(self.dataset), deque[Any](maxlen=_COMPARED)
        for seed in seeds(self.seed, np.arange(self._at - count, self._at)).tolist():
            seed_generators(seed)
            row = next(iterator, self)
            if row is self:
                if own_state is not self._unread:
                    return iterator, []  # another state than the one that was saved
                raise RunError(
                    f"the training stream ended before row {self._offset} of pass {number}, where the run stood; "
                    "give the run back its own data"
                )
            found.append(row)
        return iterator, list(found)

    def _load(self, state: Any) -> None:
        try:
            self.dataset.load_state_dict(copy.deepcopy(state))
        except Exception as error:  # whatever a user's code raises
            raise ConfigError(
                f"the training stream does not take its own state back: load_state_dict raised "
                f"{type(error).__name__}: {error}; mend it, or remove it: a resume then reads the stream again"
            ) from error

    def _end_pass(self) -> None:
        """Note the end of a pass. The next row begins another one."""
        number, rows = len(self.passes), self._offset
        if rows == 0:
            again = ": its __iter__ must begin anew each time" if number else ""
            raise RunError(f"the training stream has no rows in pass {number}{again}")
        if self.length is not None and rows < self.length:
            raise RunError(
                f"the training stream ended after {rows} rows of pass {number}, but its len() is {self.length}; mend "
                "its __len__, or remove it and give the budget in samples or steps"
            )
        self.passes.append(rows)
        self._offset, self._iterator = 0, None


def has_state(dataset: Any) -> bool:
    """Return whether a data set can say where it stands, and go on from there, by torchdata's protocol."""
    return callable(getattr(dataset, "state_dict", None)) and callable(getattr(dataset, "load_state_dict", None))


def digests(rows: list[Any]) -> list[str]:
    """Return a text for each row that two rows share only if they are alike."""
    found: list[str] = []
    for row in rows:
        digest = hashlib.sha256()
        _feed(digest, row)
        found.append(digest.hexdigest()[:16])
    return found


def _feed(digest: Any, value: Any) -> None:
    """Feed a row to a digest: its tensors, arrays and plain values; of other objects their type."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for inner in value:
            _feed(digest, inner)
        return
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        value = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
        return
    known = value is None or isinstance(value, str | bytes | int | float)
    digest.update((repr(value) if known else type(value).__name__).encode())
