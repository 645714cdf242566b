"""Files: the rows of sharded corpora by number: Parquet, Arrow and JSONL, local or in object storage."""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import default_collate

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, UInt64s
from distgrow.core.window_order import WindowOrder
from distgrow.data.columns import Lists, Numbers, TablePiece
from distgrow.data.dataset import Gathered, Ordered
from distgrow.data.piece_cache import Piece, PieceCache
from distgrow.data.seeding import seed_generators
from distgrow.data.shards import Shard, connect, find, kind_of, look

Row = dict[str, Any]


class Files(Gathered, Ordered):
    """Rows of Parquet, Arrow and JSONL files, as dicts; each once an epoch, in an order that is arithmetic.

    An epoch shuffles the pieces of the files (Parquet's row groups, Arrow's batches, 1,024 JSON lines), lays them end
    to end, and shuffles rows within windows.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        columns: Sequence[str] | None = None,
        window: int = 16_384,
        transform: Callable[[Row], Any] | None = None,
        cache: str | Path | None = None,
        cache_gib: float = 8.0,
    ) -> None:
        """Read the footers of the files; of JSONL, the lines' ends.

        Args:
            path: A file, a folder or a pattern, or several; local paths or URIs (s3://, gs://, hf://, …).
            columns: The columns to read. None: all.
            window: Rows that are shuffled together.
            transform: Makes a sample of a row. What it draws from Python's, numpy's and torch's generators follows from
                the run's seed and the row's position.
            cache: A folder on each host for decoded pieces. None: a folder of yours in the temporary folder.
            cache_gib: Its size, at most. 0: every process decodes for itself.

        Raises:
            ConfigError: Nothing is there, or a file cannot be read or has another schema.
        """
        paths = _paths(path)
        if transform is not None and not callable(transform):
            raise ConfigError(f"transform={transform!r}: allowed is a function of a row, a dict")
        self.columns, self.window, self.transform = _names(columns), _rows(window), transform
        if not (isinstance(cache_gib, int | float) and 0 <= cache_gib < float("inf")):
            raise ConfigError(f"cache_gib={cache_gib!r}: allowed are numbers from 0")
        folder = Path(cache) if cache else Path(tempfile.gettempdir()) / f"distgrow-{os.getuid()}"
        self.shards = [_looked_at(uri, self.columns, folder) for uri in find([str(each) for each in paths])]
        _check_schemas(self.shards)
        parts = [(shard, k) for shard in self.shards for k, size in enumerate(shard.sizes) if size]
        if not parts:
            raise ConfigError(f"path={', '.join(map(str, paths))}: the files have no rows")
        self._parts, self.sizes = parts, tuple(shard.sizes[k] for shard, k in parts)
        self._sizes = np.asarray(self.sizes, np.int64)
        self._ends = np.cumsum(self._sizes)
        spread = -(-self.window * len(parts) // len(self))  # pieces of a window
        self._pieces = PieceCache(folder, self.columns, most_bytes=int(cache_gib * 2**30), most_open=2 * (spread + 1))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def order(self, seed: int) -> WindowOrder:
        """See Ordered."""
        return WindowOrder(sizes=self.sizes, window=self.window, seed=seed)

    def facts(self) -> dict[str, int]:
        """See Ordered."""
        digest = hashlib.sha256(np.asarray(self.sizes, np.int64).tobytes()).digest()
        return {"rows in a shuffled window": self.window, "as digest of the pieces": int.from_bytes(digest[:6], "big")}

    def rows(self, indices: Int64s, seeds: UInt64s) -> list[Any]:
        """See Gathered."""
        found: list[Any] = [None] * len(indices)
        for piece, where, local in self._located(indices):
            for place, row in zip(where.tolist(), local.tolist(), strict=True):
                found[place] = piece.row(row)
        if self.transform is None:
            return found
        for place, seed in enumerate(seeds.tolist()):
            seed_generators(seed)
            found[place] = self.transform(found[place])
        return found

    def collated(self, indices: Int64s, seeds: UInt64s, collate: Callable[[list[Any]], Any]) -> Any:
        """Return the collated rows. Torch's own collation of plain columns is done column by column."""
        located = self._located(indices)
        pieces = [piece for piece, _, _ in located]
        if collate is not default_collate or self.transform or not all(isinstance(p, TablePiece) for p in pieces):
            return collate(self.rows(indices, seeds))
        names = pieces[0].columns  # pyright: ignore[reportAttributeAccessIssue]  # tables alone
        return {name: _gathered(name, located, len(indices)) for name in names}

    def _located(self, indices: Int64s) -> list[tuple[Piece, Int64s, Int64s]]:
        """Return for each piece that holds some of the rows: where they are wanted, and their numbers in it."""
        numbers = np.searchsorted(self._ends, indices, side="right")
        order = np.argsort(numbers, kind="stable")
        wanted, begins = np.unique(numbers[order], return_index=True)
        pieces = self._pieces.pieces([self._parts[number] for number in wanted.tolist()])
        local = indices - (self._ends[numbers] - self._sizes[numbers])
        groups = np.split(order, begins[1:])
        return [(piece, where, local[where]) for piece, where in zip(pieces, groups, strict=True)]


def _gathered(name: str, located: Sequence[tuple[Any, Int64s, Int64s]], count: int) -> Any:
    """Return what torch's collation makes of a column of some rows."""
    columns = [piece.columns[name] for piece, _, _ in located]
    if all(isinstance(column, Numbers) for column in columns):
        out = np.empty(count, columns[0].values.dtype)
        for column, (_, where, local) in zip(columns, located, strict=True):
            out[where] = column.values[local]
        tensor = torch.from_numpy(out)
        return (
            tensor.double() if tensor.is_floating_point() else tensor.long() if tensor.dtype != torch.bool else tensor
        )
    tables = [piece.tables.get(name) for piece, _, _ in located]
    if all(table is not None and table.shape[1:] == tables[0].shape[1:] for table in tables):
        out = np.empty((count, *tables[0].shape[1:]), tables[0].dtype)
        for table, (_, where, local) in zip(tables, located, strict=True):
            out[where] = table[local]
        return torch.from_numpy(out)
    values: list[Any] = [None] * count
    for column, (_, where, local) in zip(columns, located, strict=True):
        for place, row in zip(where.tolist(), local.tolist(), strict=True):
            values[place] = column.value(row)
    if all(isinstance(column, Lists) for column in columns):
        lengths = {len(value) for value in values}
        if len(lengths) > 1:
            raise ConfigError(
                f"column {name} has rows of {min(lengths)} to {max(lengths)} numbers, which make no tensor: give "
                "collate=, or Packed(…), which packs them into windows of one length"
            )
        return torch.from_numpy(np.stack(values))
    if None in values:
        raise ConfigError(f"column {name} has rows without a value: fill them in transform=, or give collate=")
    return default_collate(values)


def _paths(path: Any) -> list[Any]:
    paths = [path] if isinstance(path, str | Path) else path
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(one, str | Path) for one in paths):
        raise ConfigError(f"path={path!r}: allowed is a file, a folder, a pattern or a URI, or a list of them")
    return list(paths)


def _names(columns: Any) -> tuple[str, ...] | None:
    if columns is None:
        return None
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns) or not columns:
        raise ConfigError(f"columns={columns!r}: allowed is a list of names, such as ['text']")
    return tuple(columns)


def _rows(window: Any) -> int:
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ConfigError(f"window={window!r}: allowed are whole numbers of rows from 1; 1 shuffles pieces alone")
    return window


def _looked_at(uri: str, columns: Sequence[str] | None, folder: Path) -> Shard:
    """Return what a file holds. The lines' ends of JSONL are kept in `folder`: other processes need not look again."""
    if kind_of(uri) != "jsonl":
        return look(uri, columns)
    files, path = connect(uri)
    info = files.get_file_info(path)
    name = hashlib.sha256(repr((uri, info.size, info.mtime_ns)).encode()).hexdigest()
    kept = folder / f"{name}.index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            if not kept.exists():
                part = kept.with_suffix(f".{os.getpid()}")
                shard = look(uri, columns)
                np.save(part, np.array([shard.sizes, shard.begins[1:]], np.int64))
                part.with_suffix(part.suffix + ".npy").replace(kept)
            sizes, ends = np.load(kept).tolist()
    except (OSError, ValueError, pickle.UnpicklingError):
        return look(uri, columns)
    stamp = f"{info.size}-{info.mtime_ns}"
    return Shard(uri=uri, kind="jsonl", stamp=stamp, sizes=tuple(sizes), begins=(0, *ends))


def _check_schemas(shards: Sequence[Shard]) -> None:
    """Check that all files have the columns and types of the first one that shows them."""
    known = [shard for shard in shards if shard.kind != "jsonl"]
    for shard in known:
        there, here = dict(known[0].schema), dict(shard.schema)
        if there != here:
            names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
            differing = "; ".join(
                f"{name}: {here.get(name, 'missing')}, not {there.get(name, 'missing')}" for name in names
            )
            raise ConfigError(
                f"{shard.uri} has another schema than {known[0].uri} ({differing}); "
                "give columns=, or leave the file out"
            )
