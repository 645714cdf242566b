"""Mixture and Packed: rows by position, the same whoever draws them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from distgrow import Files, Mixture, Packed
from distgrow.core.errors import ConfigError
from distgrow.data.stream import SampleStream, evaluation_batches
from distgrow.distributed.world import World

DOCUMENTS = [list(range(10 * k, 10 * k + n)) for k, n in enumerate([3, 7, 0, 1, 9, 2, 5, 8, 1, 4])]


class Noisy:
    """Rows whose second number is random."""

    def __init__(self, first: int, rows: int) -> None:
        self.first, self.rows = first, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([self.first + index, float(torch.rand(()))], dtype=torch.double)


def test_a_mixture_draws_each_set_by_weight_and_the_same_in_any_parts() -> None:
    mixture = Mixture([(Noisy(0, 40), 3), (Noisy(1000, 25), {0: 1.0, 200: 3.0})])
    whole = SampleStream(mixture, seed=5).__getitems__(range(400))
    assert abs((whole[:200, 0] >= 1000).sum().item() - 50) <= 6
    assert abs((whole[200:, 0] >= 1000).sum().item() - 100) <= 6
    own = whole[whole[:, 0] < 1000, 0].tolist()
    assert sorted(own[:40]) == list(range(40))
    other = SampleStream(pickle.loads(pickle.dumps(mixture)), seed=5)
    parts = [other.__getitems__(range(k, min(k + 7, 400))) for k in range(392, -1, -7)]
    assert torch.equal(torch.cat(parts[::-1]), whole[:399])
    assert torch.equal(other.__getitems__([3, 399]), whole[[3, 399]])


def test_a_mixture_of_files_reads_them_in_windows(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 1000)):
        table = pa.table({"id": range(first, first + 90)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=10)
    a, b = (Files(tmp_path / f"{name}.parquet", window=20, cache=tmp_path / "cache") for name in "ab")
    ids = SampleStream(Mixture([(a, 1), (b, 1)]), seed=1).__getitems__(range(180))["id"]
    for first in (0, 1000):
        own = ids[(ids >= first) & (ids < first + 90)][:80]
        assert len(own.unique()) == 80
        assert len({int(i) // 10 for i in own[:20]}) == 2  # a window is two row groups


def test_a_mixture_that_cannot_be_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    rows = TensorDataset(torch.zeros(3))
    for parts, message in (
        ([], "list of pairs"),
        ([rows], "list of pairs"),
        ([(rows, 0.0)], "weights of all 1 sets are 0"),
        ([(rows, 1.0), (Stream(), 1.0)], "mixture: set 1 is Stream, which has no rows by number"),
        ([(TensorDataset(torch.zeros(0)), 1.0)], "set 0 is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mixture(parts)  # pyright: ignore[reportArgumentType]


def by_hand(length: int, end: int | None, across: bool, shifted: bool) -> list[dict[str, list[int]]]:
    """Windows from one list of (token, document) of all documents."""
    flat = [(t, d) for d, document in enumerate(DOCUMENTS) for t in [*document, *([] if end is None else [end])]]
    windows = []
    for k in range((len(flat) - shifted) // length):
        part = flat[k * length : (k + 1) * length]
        follow = flat[k * length + shifted : (k + 1) * length + shifted]
        before = [None, *part]
        labels = [
            t if across or (d == part[i][1] if shifted else i == 0 or d == before[i][1]) else -100  # pyright: ignore
            for i, (t, d) in enumerate(follow)
        ]
        owners = sorted({d for _, d in part})
        opens = [next(i for i, (_, d) in enumerate(part) if d == owner) for owner in owners]
        ids = [owners.index(d) for _, d in part]
        places = [i - opens[owner] for i, owner in enumerate(ids)]
        tokens = [t for t, _ in part]
        windows.append({"input_ids": tokens, "labels": labels, "position_ids": places, "document_ids": ids})
    return windows


@pytest.mark.parametrize("length", [1, 4, 7, 39])
@pytest.mark.parametrize("end", [None, 999])
@pytest.mark.parametrize(("across", "shifted"), [(False, True), (True, True), (False, False)])
def test_windows_and_their_boundaries_are_those_made_by_hand(
    length: int, end: int | None, across: bool, shifted: bool
) -> None:
    documents = [torch.tensor(document, dtype=torch.long) for document in DOCUMENTS]
    packed = Packed(documents, length, end=end, across=across, shifted=shifted)
    expected = by_hand(length, end, across, shifted)
    assert len(packed) == len(expected)
    batches = list(evaluation_batches(packed, World(), 5))
    found = {name: torch.cat([batch[name] for batch, _ in batches]).tolist() for name in expected[0]}
    assert found == {name: [window[name] for window in expected] for name in expected[0]}


def test_packed_files_are_the_same_windows_each_once_an_epoch(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, 50, random.integers(0, 30)).tolist() for _ in range(400)]
    for part in range(4):
        table = pa.table({"tokens": pa.array(documents[100 * part : 100 * part + 100], pa.list_(pa.int32()))})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=30)
    files = Files(tmp_path, columns=["tokens"], cache=tmp_path / "cache")
    packed = Packed(files, 8, column="tokens", end=50, window=100)
    here = Packed(documents, 8, end=50, lengths=[len(document) for document in documents])
    assert len(packed) == len(here) > 500
    windows = SampleStream(packed, seed=2).__getitems__(range(len(packed)))["input_ids"].tolist()
    assert sorted(windows) == sorted(here[k]["input_ids"].tolist() for k in range(len(here)))
    assert windows != [here[k]["input_ids"].tolist() for k in range(len(here))]


def test_documents_that_cannot_be_packed_are_refused() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (DOCUMENTS, {"length": 0}, "length=0"),
        (DOCUMENTS, {"length": 40}, "have 40 tokens, too few"),
        ([], {"length": 4}, "have 0 tokens, too few"),
        (["text"], {"length": 4}, "no sequence of token numbers"),
        ([[0.5, 1.5]], {"length": 1}, "no sequence of token numbers"),
        ([{"text": [1, 2]}], {"length": 1, "column": "tokens"}, "column='tokens': a document is a dict"),
        (DOCUMENTS, {"length": 4, "lengths": [1, 2]}, "there are 10 documents"),
    ]
    for documents, settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            Packed(documents, **settings)
    wrong = Packed(DOCUMENTS, 4, lengths=[4] * 10)
    with pytest.raises(ConfigError, match="document 0 has another length now"):
        wrong[0]
