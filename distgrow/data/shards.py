"""Shards: files of rows in pieces that can be read alone (Parquet's row groups, Arrow's batches, runs of JSON lines).

Knows where pieces are and how to read one; knows no order, no cache and no torch.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from distgrow.core.errors import ConfigError

#: Lines of a piece of a JSONL file.
LINES = 1024
_BLOCK = 2**23  # bytes that are searched for line ends at a time
_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".jsonl": "jsonl", ".ndjson": "jsonl"}
#: Ends of the names of files of rows.
FORMATS = tuple(_KINDS)
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Hold one file: where it is and which pieces it has."""

    uri: str
    kind: str  #: parquet, arrow or jsonl
    stamp: str  #: size and time of the last change
    sizes: tuple[int, ...]  #: rows of each piece
    begins: tuple[int, ...] = ()  #: of a JSONL file: the first byte of each piece, and the end of the last
    schema: tuple[tuple[str, str], ...] = ()  #: names and types of the columns; unknown of JSONL


def find(paths: Sequence[str]) -> list[str]:
    """Return the shards that paths, patterns, folders and URIs name, sorted by name within each of them.

    Raises:
        ConfigError: A path names nothing, or a file of a kind that has no pieces.
    """
    found = [uri for path in paths for uri in _matching(path)]
    for uri in found:
        kind_of(uri)
    return found


def kind_of(uri: str) -> str:
    """Return the format of a file by the end of its name."""
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix in _PACKED:
        raise ConfigError(f"{uri}: a compressed file has no rows that can be read alone; unpack it, or write Parquet")
    if suffix not in _KINDS:
        raise ConfigError(f"{uri}: the name must end in one of {', '.join(_KINDS)}")
    return _KINDS[suffix]


def _matching(path: str) -> list[str]:
    """Return the files of a path, sorted."""
    from pyarrow.fs import FileSelector, FileType

    files, root = connect(path)
    scheme = path.split("://")[0] + "://" if "://" in path else ""
    pattern = any(mark in PurePosixPath(root).name for mark in "*?[")
    folder = str(PurePosixPath(root).parent) if pattern else root
    with reading(path):
        if not pattern and files.get_file_info(root).type == FileType.File:
            return [path]
        selector = FileSelector(folder, recursive=not pattern, allow_not_found=True)
        names = sorted(info.path for info in files.get_file_info(selector) if info.type == FileType.File)
    if pattern:
        names = [name for name in names if PurePosixPath(name).match(PurePosixPath(root).name)]
    else:
        names = [name for name in names if PurePosixPath(name).suffix.lower() in _KINDS]
    if not names:
        raise ConfigError(
            f"path={path}: no file there; give a file, a folder or a pattern such as data/train-*.parquet"
            f" (formats: {', '.join(_KINDS)})"
        )
    return [scheme + name for name in names]


@lru_cache(maxsize=64)
def _connected(scheme: str) -> Any:
    """Return the file system of a scheme: pyarrow's own, or fsspec's."""
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    try:
        return PyFileSystem(FSSpecHandler(fsspec.filesystem(scheme)))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{scheme}:// cannot be opened: {error}") from None


def connect(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI or local path, and the path within it."""
    try:
        from pyarrow.fs import FileSystem, LocalFileSystem
    except ImportError as error:
        raise ConfigError(f"files are read by pyarrow: pip install 'distgrow[files]' ({error})") from None
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return LocalFileSystem(), uri
    if scheme in ("s3", "gs", "gcs", "hdfs", "abfs", "abfss", "file"):
        with reading(uri):
            return FileSystem.from_uri(uri)
    return _connected(scheme), rest


def is_local(uri: str) -> bool:
    """Return whether a file lies in this host's file system."""
    return "://" not in uri or uri.startswith("file://")


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn what pyarrow raises about a file into a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{uri} cannot be read: {reason}; is it whole? Restore it, or leave it out") from None


def look(uri: str, columns: Sequence[str] | None) -> Shard:
    """Return what a file holds, from its footer; a JSONL file is read through once for its lines' ends."""
    files, path = connect(uri)
    kind = kind_of(uri)
    with reading(uri):
        info = files.get_file_info(path)
        stamp = f"{info.size}-{info.mtime_ns}"
        if kind == "jsonl":
            with files.open_input_file(path) as stream:
                sizes, begins = _runs_of_lines(stream)
            return Shard(uri=uri, kind=kind, stamp=stamp, sizes=sizes, begins=begins)
        with files.open_input_file(path) as stream:
            sizes, schema = _parquet_pieces(stream) if kind == "parquet" else _arrow_pieces(stream)
    names = list(schema.names)
    if missing := [name for name in columns or () if name not in names]:
        raise ConfigError(f"{uri} has no column {', '.join(missing)}; it has {', '.join(names)}")
    chosen = tuple((name, str(schema.field(name).type)) for name in columns or names)
    return Shard(uri=uri, kind=kind, stamp=stamp, sizes=sizes, schema=chosen)


def _parquet_pieces(stream: Any) -> tuple[tuple[int, ...], Any]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stream)
    groups = range(file.metadata.num_row_groups)
    return tuple(file.metadata.row_group(group).num_rows for group in groups), file.schema_arrow


def _arrow_pieces(stream: Any) -> tuple[tuple[int, ...], Any]:
    batches, schema = arrow_batches(stream)
    return tuple(batch.num_rows for batch in batches), schema


def arrow_batches(stream: Any) -> tuple[list[Any], Any]:
    """Return the batches of an Arrow file (Feather) or stream (the data sets of Hugging Face), and its schema."""
    from pyarrow import ArrowInvalid, ipc

    try:
        file = ipc.open_file(stream)
        return [file.get_batch(k) for k in range(file.num_record_batches)], file.schema
    except ArrowInvalid:
        stream.seek(0)
        table = ipc.open_stream(stream)
        return list(table), table.schema


def _runs_of_lines(stream: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (lines, first bytes) of runs of up to LINES lines that are not empty."""
    sizes, begins, at, lines, before = list[int](), [0], 0, 0, -1
    while block := stream.read(_BLOCK):
        ends = at + np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
        filled = np.diff(ends, prepend=before) > 1
        for end in ends[filled].tolist():
            lines += 1
            if lines == LINES:
                sizes.append(lines)
                begins.append(end + 1)
                lines = 0
        before = int(ends[-1]) if ends.size else before
        at += len(block)
    lines += at - before > 1  # the last line may lack its end
    if lines:
        sizes.append(lines)
        begins.append(at)
    return tuple(sizes), tuple(begins)


def read_piece(shard: Shard, piece: int, columns: Sequence[str] | None) -> Any:
    """Return a piece of a Parquet or Arrow file as an Arrow table, or of a JSONL file its bytes."""
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

    files, path = connect(shard.uri)
    names = list(columns or [name for name, _ in shard.schema])
    with reading(shard.uri), files.open_input_file(path) as stream:
        if shard.kind == "jsonl":
            stream.seek(shard.begins[piece])
            return stream.read(shard.begins[piece + 1] - shard.begins[piece])
        if shard.kind == "parquet":
            return ParquetFile(stream).read_row_group(piece, columns=names, use_threads=False)
        return Table.from_batches([arrow_batches(stream)[0][piece]]).select(names)


def parsed(line: bytes, uri: str, columns: Sequence[str] | None) -> dict[str, Any]:
    """Return a line of a JSONL file as a row."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{uri}: a line is no JSON ({error}): {_shown(line)}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{uri}: a line is no JSON object: {_shown(line)}")
    if missing := [name for name in columns or () if name not in row]:
        raise ConfigError(f"{uri}: a row has no {', '.join(missing)}; it has {', '.join(row)}")
    return {name: _as_array(row[name]) for name in columns or row}


def _as_array(value: Any) -> Any:
    """Return a list of numbers as the array that a column of such lists gives."""
    if not isinstance(value, list) or not all(type(number) in (int, float, bool) for number in value):
        return value
    return np.asarray(value) if value else np.zeros(0, np.int64)


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace")
    return text if len(text) <= 80 else text[:79] + "…"
