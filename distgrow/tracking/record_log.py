"""Reads files of records as LevelDB's log has them; knows nothing of what the records hold.

Such a file is a row of blocks. A record lies in one fragment, or in several that end blocks:
https://github.com/google/leveldb/blob/main/doc/log_format.md (but the checksum here is zlib's CRC-32).
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32768
#: Before each fragment: the CRC of kind and data, the length of the data, the kind.
FRAGMENT = struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path, header: bytes) -> Iterator[bytes]:
    """Yield the whole records of a file, up to its end or to the first that is torn.

    Args:
        file: as its writer left it, perhaps amid a record.
        header: what the first block begins with.

    Raises:
        ValueError: the file begins with something else.
    """
    begun = b""
    for kind, data in _fragments(file, header):
        begun = data if kind in (WHOLE, FIRST) else begun + data
        if kind in (WHOLE, LAST):
            yield begun


def _fragments(file: Path, header: bytes) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as stream:
        block, at = stream.read(BLOCK), len(header)
        if block[:at] != header:
            raise ValueError(f"it begins with {block[:at]!r}, not with {header!r}")
        while block:
            while at + FRAGMENT.size <= len(block):
                checksum, length, kind = FRAGMENT.unpack_from(block, at)
                at += FRAGMENT.size
                data = block[at : at + length]
                if kind not in (WHOLE, FIRST, MIDDLE, LAST) or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
                    return
                yield kind, data
                at += length
            block, at = stream.read(BLOCK), 0
