"""A file of records can be read wherever its writer was stopped: what is whole is there, what is torn is not."""

import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgrow.tracking.record_log import BLOCK, records

HEADER = b":W&B\xe1\xbe\x00"
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def written(contents: list[bytes]) -> tuple[bytes, list[int]]:
    """(a file of these records, where each ends), by the words of LevelDB's page."""
    file, ends = HEADER, list[int]()
    for content in contents:
        left, begun = content, False
        while True:
            room = BLOCK - len(file) % BLOCK
            if room < 7:
                file += bytes(room)
                continue
            data, left = left[: room - 7], left[room - 7 :]
            kind = (MIDDLE if left else LAST) if begun else (FIRST if left else WHOLE)
            checksum = zlib.crc32(bytes([kind]) + data)
            file += checksum.to_bytes(4, "little") + len(data).to_bytes(2, "little") + bytes([kind]) + data
            begun = True
            if not left:
                break
        ends.append(len(file))
    return file, ends


LENGTHS = st.integers(0, 300) | st.integers(BLOCK - 30, BLOCK + 30) | st.just(2 * BLOCK + 5)


@settings(max_examples=60, deadline=None)
@given(st.lists(LENGTHS, max_size=8), st.floats(0, 1), st.booleans())
def test_of_a_file_that_ends_anywhere_all_whole_records_are_read(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], part: float, zeros: bool
) -> None:
    contents = [bytes([number + 1]) * length for number, length in enumerate(lengths)]
    whole, ends = written(contents)
    cut = len(HEADER) + round(part * (len(whole) - len(HEADER)))
    file = tmp_path_factory.mktemp("log") / "file"
    file.write_bytes(whole[:cut] + bytes(500 * zeros))  # some file systems leave zeros at the end
    held = [content for content, end in zip(contents, ends, strict=True) if end <= cut]
    assert list(records(file, HEADER)) == held


def test_reading_stops_at_a_damaged_record(tmp_path: Path) -> None:
    whole, ends = written([b"one", b"two", b"three"])
    damaged = bytearray(whole)
    damaged[ends[1] - 1] ^= 1
    (tmp_path / "file").write_bytes(damaged)
    assert list(records(tmp_path / "file", HEADER)) == [b"one"]


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b":W&B\xe1\xbe\x01")
    with pytest.raises(ValueError, match="begins with"):
        list(records(tmp_path / "file", HEADER))
