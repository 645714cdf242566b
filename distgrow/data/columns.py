"""Columns: the values of a piece of rows, by row, without copies where Arrow's layout allows it. Knows no file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from distgrow.core.order import Int64s
from distgrow.data.shards import parsed


class Column(Protocol):
    """Give the values of one column of a piece."""

    def value(self, row: int) -> Any:
        """Return the value of a row, which nothing else shares memory with."""
        ...


@dataclass(frozen=True, slots=True)
class Numbers:
    """A number a row."""

    values: npt.NDArray[Any]

    def value(self, row: int) -> Any:
        """See Column."""
        return self.values[row].item()


@dataclass(frozen=True, slots=True)
class Lists:
    """A list of numbers a row."""

    values: npt.NDArray[Any]
    offsets: Int64s

    def value(self, row: int) -> Any:
        """See Column."""
        return self.values[self.offsets[row] : self.offsets[row + 1]].copy()

    def table(self) -> npt.NDArray[Any] | None:
        """Return the lists as rows of one array without a copy, or None if they differ in length."""
        begin, lengths = self.offsets[0], np.diff(self.offsets)
        if not lengths.size or (lengths != lengths[0]).any():
            return None
        return self.values[begin : self.offsets[-1]].reshape(len(lengths), -1) if lengths[0] else None


@dataclass(frozen=True, slots=True)
class Objects:
    """Anything else, as Python objects."""

    values: Any

    def value(self, row: int) -> Any:
        """See Column."""
        return self.values[row].as_py()


def column_of(array: Any) -> Column:
    """Return the column of an Arrow array."""
    from pyarrow import types

    kind = array.type
    if _is_number(kind) and not array.null_count:
        return Numbers(array.to_numpy(zero_copy_only=False))
    if types.is_fixed_size_list(kind) and _is_number(kind.value_type) and not array.null_count:
        inner = array.flatten()
        if not inner.null_count:
            offsets = np.arange(len(array) + 1, dtype=np.int64) * kind.list_size
            return Lists(inner.to_numpy(zero_copy_only=False), offsets)
    if (types.is_list(kind) or types.is_large_list(kind)) and _is_number(kind.value_type) and not array.null_count:
        inner = array.values
        if not inner.null_count:
            return Lists(inner.to_numpy(zero_copy_only=False), array.offsets.to_numpy().astype(np.int64))
    return Objects(array)


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


class TablePiece:
    """The rows of an Arrow table."""

    def __init__(self, table: Any) -> None:
        whole = table.combine_chunks()
        self.columns = {name: column_of(_one(whole.column(name))) for name in table.column_names}
        tables = {name: column.table() for name, column in self.columns.items() if isinstance(column, Lists)}
        self.tables = {name: table for name, table in tables.items() if table is not None}  #: lists of one length
        self._rows = table.num_rows

    def __len__(self) -> int:
        return self._rows

    def row(self, row: int) -> dict[str, Any]:
        """Return one row."""
        return {name: column.value(row) for name, column in self.columns.items()}


def _one(column: Any) -> Any:
    """Return a column of a table as one array."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class LinesPiece:
    """The rows of a run of JSON lines, parsed when they are asked for."""

    def __init__(self, data: Any, uri: str, columns: Sequence[str] | None) -> None:
        self._data, self._uri, self._names = memoryview(data), uri, columns
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
        if len(data) and (not ends.size or ends[-1] != len(data) - 1):
            ends = np.append(ends, len(data))
        begins = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
        filled = ends > begins
        self._begins, self._ends = begins[filled], ends[filled]

    def __len__(self) -> int:
        return len(self._begins)

    def row(self, row: int) -> dict[str, Any]:
        """Return one row."""
        return parsed(bytes(self._data[self._begins[row] : self._ends[row]]), self._uri, self._names)
