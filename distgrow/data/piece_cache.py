"""PieceCache: reads pieces of shards for all processes of a host; each piece is decoded once and then mapped by all."""

import hashlib
import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distgrow.core.errors import ConfigError
from distgrow.data.columns import LinesPiece, TablePiece
from distgrow.data.shards import Shard, arrow_batches, is_local, read_piece

_LOCKS = 64  # files; two pieces may share one, which costs a wait
_WAIT_S = 600.0  # for a process that reads the same piece
Piece = TablePiece | LinesPiece


class PieceCache:
    """Keep pieces open in this process, and decoded ones in a folder that all processes of the host share.

    Local Arrow files and JSONL files need no copy: they are mapped as they are.
    """

    def __init__(self, folder: Path, columns: Sequence[str] | None, *, most_bytes: int, most_open: int) -> None:
        """Use a folder. It is made when the first piece is kept.

        Args:
            folder: Where decoded pieces are kept.
            columns: The columns that are read; None: all.
            most_bytes: Of the folder; the pieces that were used least lately go first. 0: nothing is kept there.
            most_open: Pieces that this process holds.
        """
        self._folder, self._columns = folder, columns
        self._most_bytes, self._most_open = most_bytes, most_open
        self._open = OrderedDict[tuple[str, int], Piece]()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open pieces behind: another process opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def pieces(self, wanted: Sequence[tuple[Shard, int]]) -> list[Piece]:
        """Return pieces. Those that another process is reading are waited for last."""
        keys = [(shard.uri, piece) for shard, piece in wanted]
        missing = {key: part for key, part in zip(keys, wanted, strict=True) if key not in self._open}
        busy = {key: part for key, part in missing.items() if not self._opened(*part, wait_s=0)}
        for part in busy.values():
            self._opened(*part, wait_s=_WAIT_S)
        for key in keys:
            self._open.move_to_end(key)
        found = [self._open[key] for key in keys]
        while len(self._open) > max(self._most_open, len(keys)):
            self._open.popitem(last=False)
        return found

    def _opened(self, shard: Shard, piece: int, *, wait_s: float) -> bool:
        """Open a piece. Return False if another process is still reading it after `wait_s`."""
        key = (shard.uri, piece)
        if is_local(shard.uri) and shard.kind != "parquet":
            self._open[key] = _whole(self._mapped(shard, piece), shard, piece)
            return True
        if not self._most_bytes:
            self._open[key] = self._made(shard, piece, read_piece(shard, piece, self._columns))
            return True
        file = self._folder / _name(shard, piece, self._columns)
        with suppress(OSError, ValueError):
            self._open[key] = self._kept(shard, piece, file)
            return True
        self._make_folder()
        try:
            with FileLock(self._folder / f"{int(file.stem[:8], 16) % _LOCKS}.lock", timeout=wait_s):
                with suppress(OSError, ValueError):
                    self._open[key] = self._kept(shard, piece, file)
                    return True
                content = read_piece(shard, piece, self._columns)
                self._open[key] = self._made(shard, piece, content)
                self._keep(file, content)
                return True
        except Timeout:
            if wait_s == 0:
                return False
            raise ConfigError(
                f"{self._folder}: another process has been reading {shard.uri} for {wait_s:g} s"
            ) from None

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cache={self._folder}: {error.strerror}; give another folder, or cache_gib=0 for none"
            ) from None

    def _made(self, shard: Shard, piece: int, content: Any) -> Piece:
        lines = shard.kind == "jsonl"
        return _whole(LinesPiece(content, shard.uri, self._columns) if lines else TablePiece(content), shard, piece)

    def _kept(self, shard: Shard, piece: int, file: Path) -> Piece:
        """Map a decoded piece. OSError if it is not there, ValueError if it is damaged."""
        import pyarrow as pa

        os.utime(file)
        with pa.memory_map(str(file)) as source:
            lines = shard.kind == "jsonl"
            return self._made(shard, piece, source.read_buffer() if lines else pa.ipc.open_file(source).read_all())

    def _keep(self, file: Path, content: Any) -> None:
        """Write a decoded piece for other processes. If the disk is full, each process decodes it for itself."""
        import pyarrow as pa

        part = file.with_suffix(f".{os.getpid()}")
        try:
            with pa.OSFile(str(part), "wb") as sink:
                if isinstance(content, pa.Table):
                    with pa.ipc.new_file(sink, content.schema) as writer:
                        writer.write_table(content.combine_chunks())
                else:
                    sink.write(content)
            part.replace(file)
        except OSError:
            part.unlink(missing_ok=True)
        self._evict(but=file)

    def _evict(self, *, but: Path) -> None:
        """Delete the pieces that were used least lately until the folder is small enough. Maps of them stay valid."""
        with suppress(OSError):
            entries = [(entry, entry.stat()) for entry in os.scandir(self._folder) if not entry.name.endswith(".lock")]
            total = sum(stat.st_size for _, stat in entries)
            for entry, stat in sorted(entries, key=lambda each: each[1].st_mtime):
                if total <= self._most_bytes:
                    return
                if entry.name != but.name:
                    Path(entry.path).unlink(missing_ok=True)
                    total -= stat.st_size

    def _mapped(self, shard: Shard, piece: int) -> Piece:
        """Map a piece of a local file that needs no decoding."""
        import pyarrow as pa

        path = shard.uri.removeprefix("file://")
        if shard.kind == "arrow":
            with pa.memory_map(path) as source:
                batch = arrow_batches(source)[0][piece]
            names = list(self._columns or [name for name, _ in shard.schema])
            return TablePiece(pa.Table.from_batches([batch]).select(names))
        begin, end = shard.begins[piece], shard.begins[piece + 1]
        with Path(path).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return LinesPiece(whole[begin:end], shard.uri, self._columns)


def _whole(made: Piece, shard: Shard, piece: int) -> Piece:
    """Return a piece if it has as many rows as when the run began."""
    if len(made) != shard.sizes[piece]:
        raise ConfigError(
            f"{shard.uri} has changed since the run began: a piece has {len(made)} rows, not {shard.sizes[piece]}"
        )
    return made


def _name(shard: Shard, piece: int, columns: Sequence[str] | None) -> str:
    """Return the name of a decoded piece, which a file that has changed does not share."""
    text = repr((shard.uri, shard.stamp, piece, columns))
    return f"{hashlib.sha256(text.encode()).hexdigest()}.{'lines' if shard.kind == 'jsonl' else 'arrow'}"
