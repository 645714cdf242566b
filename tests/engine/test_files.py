"""Files: sharded corpora by position, on real files."""

import gc
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distgrow import budget, every, exponential
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Outcome, Progress
from distgrow.data.loader import DirectLoader, Loader, PrefetchingLoader
from distgrow.data.sharded import Files
from distgrow.data.stream import SampleStream, evaluation_batches
from distgrow.distributed.world import World
from distgrow.growth.controller import Controller

ROWS = 300
KINDS = ["parquet", "arrow", "stream", "jsonl"]


def table(first: int, count: int) -> pa.Table:
    """Rows with a number, a list of numbers, a text and a truth value."""
    ids = range(first, first + count)
    return pa.table(
        {
            "id": pa.array(ids),
            "x": pa.array([[float(i), i / 4] for i in ids], pa.list_(pa.float64())),
            "text": [f"row {i}" for i in ids],
            "even": [i % 2 == 0 for i in ids],
        }
    )


def written(folder: Path, kind: str) -> str:
    """Three files of 80, 100 and 120 rows; the pattern that names them."""
    folder.mkdir(exist_ok=True)
    ending = "arrow" if kind == "stream" else kind
    for k, (first, count) in enumerate([(0, 80), (80, 100), (180, 120)]):
        rows, file = table(first, count), folder / f"part-{k}.{ending}"
        if kind == "parquet":
            pq.write_table(rows, file, row_group_size=32)
        elif kind == "jsonl":
            file.write_text("\n\n".join(json.dumps(row) for row in rows.to_pylist()))  # empty lines, no last end
        else:
            with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(str(file), rows.schema) as sink:
                sink.write_table(rows, max_chunksize=32)
    return str(folder / f"*.{ending}")


def controller(world: int = 1, max_micro: int = 4) -> Controller:
    """Three stages over more than an epoch of the rows."""
    return Controller(
        growth=exponential(4, 2, 16), stages=every(samples=100), budget=budget(samples=450), epoch=ROWS,
        world=world, max_micro=max_micro,
    )  # fmt: skip


def drawn(files: Files, control: Controller, begin: int = 0, workers: int = 0) -> list[int]:
    """The ids that all ranks draw, in stream order, from the first update that begins at `begin` samples or later."""
    stream, ids, progress = SampleStream(files, seed=7), list[int](), Progress()
    loaders: list[Loader] = [
        PrefetchingLoader(stream, rank, control, workers=workers, prefetch=2, pin=False)
        if workers
        else DirectLoader(stream, rank)
        for rank in range(control.world)
    ]
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        if progress.samples >= begin:
            ids += [int(i) for loader in loaders for batch in loader.draw(progress, plan) for i in batch["id"]]
        progress = progress.after(plan, Outcome())
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_comes_once_an_epoch_whatever_the_ranks_the_loader_and_the_interruption(
    kind: str, tmp_path: Path
) -> None:
    files = Files(written(tmp_path, kind), columns=["id", "x"], window=50, cache=tmp_path / "cache")
    alone = drawn(files, controller())
    assert sorted(alone[:ROWS]) == list(range(ROWS))
    assert alone[:ROWS] != sorted(alone[:ROWS])
    assert len(set(alone[ROWS:])) == 450 - ROWS
    assert drawn(files, controller(world=3, max_micro=2)) == alone
    assert drawn(pickle.loads(pickle.dumps(files)), controller(world=2), workers=2) == alone
    again = Files(written(tmp_path, kind), columns=["id", "x"], window=50, cache_gib=0)
    rest = drawn(again, controller(world=2), begin=200)
    assert 200 < len(rest) <= 250
    assert rest == alone[-len(rest) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_what_was_written_and_a_batch_is_what_torch_makes_of_rows(kind: str, tmp_path: Path) -> None:
    files = Files(written(tmp_path, kind), window=50, cache=tmp_path / "cache")
    for row, expected in ((files[i], table(i, 1).to_pylist()[0]) for i in (0, 79, 80, 179, 299)):
        assert {**row, "x": row["x"].tolist()} == expected
    rows = SampleStream(files, seed=7, collate=list).__getitems__(range(20))
    batch, expected = SampleStream(files, seed=7).__getitems__(range(20)), torch.utils.data.default_collate(rows)
    assert batch["text"] == expected["text"]
    for name in ("id", "x", "even"):
        assert batch[name].dtype == expected[name].dtype
        assert torch.equal(batch[name], expected[name])


def test_evaluation_reads_rows_in_order_over_all_ranks(tmp_path: Path) -> None:
    files = Files(written(tmp_path, "parquet"), columns=["id"], cache=tmp_path / "cache")
    parts = [evaluation_batches(files, World(rank=rank, size=3), 7) for rank in range(3)]
    assert [int(i) for part in parts for batch, rows in part for i in batch["id"][:rows]] == list(range(ROWS))


def test_what_a_transform_draws_follows_from_seed_and_position(tmp_path: Path) -> None:
    def noisy(row: dict[str, Any]) -> torch.Tensor:
        return torch.tensor([row["id"], float(torch.rand(())), float(np.random.rand())], dtype=torch.double)

    files = Files(written(tmp_path, "parquet"), transform=noisy, cache=tmp_path / "cache")
    together = SampleStream(files, seed=3).__getitems__(range(290, 320))
    single = [SampleStream(files, seed=3).__getitems__(range(i, i + 1)) for i in range(290, 320)]
    assert torch.equal(together, torch.cat(single))
    assert len(together[:, 1].unique()) == 30


def test_any_file_system_of_fsspec_gives_the_same_rows(tmp_path: Path) -> None:
    import fsspec

    memory, local = fsspec.filesystem("memory"), Files(written(tmp_path, "jsonl"), window=50, cache=tmp_path / "cache")
    for file in tmp_path.glob("*.jsonl"):
        memory.pipe(f"/corpus/{file.name}", file.read_bytes())
    remote = Files("memory://corpus/part-*.jsonl", window=50, cache=tmp_path / "cache")
    assert len(remote.shards) == 3
    assert drawn(remote, controller()) == drawn(local, controller())


def test_a_small_cache_changes_no_row(tmp_path: Path) -> None:
    pattern, cache = written(tmp_path, "parquet"), tmp_path / "cache"
    large, small = Files(pattern, cache_gib=0), Files(pattern, cache=cache, cache_gib=1e-5)
    assert drawn(small, controller()) == drawn(large, controller())
    assert sum(file.stat().st_size for file in cache.glob("*.arrow")) < 2 * 1e-5 * 2**30


def test_files_at_fault_are_named(tmp_path: Path) -> None:
    pattern = written(tmp_path, "parquet")
    with pytest.raises(ConfigError, match="nothing/: no file there"):
        Files(f"{tmp_path}/nothing/")
    with pytest.raises(ConfigError, match=r"part-0.parquet has no column label; it has id, x, text, even"):
        Files(pattern, columns=["label"])
    with pytest.raises(ConfigError, match="must end in one of"):
        Files(str(Path(__file__)))
    with pytest.raises(ConfigError, match="compressed"):
        (tmp_path / "a.jsonl.gz").write_bytes(b"")
        Files(str(tmp_path / "a.jsonl.gz"))
    with pytest.raises(ConfigError, match="columns='id'"):
        Files(pattern, columns="id")
    for path in (None, 5, [], [5]):
        with pytest.raises(ConfigError, match="allowed is a file, a folder"):
            Files(path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"cache=/proc/nope: .*cache_gib=0"):
        SampleStream(Files(pattern, cache="/proc/nope")).__getitems__(range(3))
    with pytest.raises(ConfigError, match="window=0"):
        Files(pattern, window=0)
    pq.write_table(table(0, 8).set_column(0, "id", pa.array([0.5] * 8)), tmp_path / "part-9.parquet")
    with pytest.raises(ConfigError, match="part-9.parquet has another schema than .*part-0.*id: double, not int64"):
        Files(pattern)
    whole = (tmp_path / "part-0.parquet").read_bytes()
    (tmp_path / "part-9.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="part-9.parquet cannot be read"):
        Files(pattern)


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_break_during_a_run_are_named_without_a_traceback(workers: int, tmp_path: Path) -> None:
    pattern = written(tmp_path, "parquet")
    files = Files(pattern, cache_gib=0)
    for file in tmp_path.glob("*.parquet"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"part-\d.parquet cannot be read") as caught:
        drawn(files, controller(), workers=workers)
    assert "Traceback" not in str(caught.value)
    del caught
    gc.collect()  # the error's frames hold the loader, and with it its processes


def test_a_line_that_is_no_row_is_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n[3]\n{"id": \n{"x": 1}\n')
    files = Files(tmp_path / "a.jsonl", columns=["id"], cache=tmp_path / "cache")
    assert files[0] == {"id": 1}
    for row, message in ((1, r"no JSON object: \[3\]"), (2, 'no JSON .*{"id": '), (3, "a row has no id; it has x")):
        with pytest.raises(ConfigError, match=f"a.jsonl: .*{message}"):
            files[row]
