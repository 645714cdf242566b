"""The task of a corpus, from a config: packed files, alone and mixed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distgrow.config.load import parse
from distgrow.core.errors import ConfigError
from distgrow.tasks.corpus import Corpus

GPT = {"kind": "gpt", "layers": 1, "width": 16, "heads": 2}


def write(folder: Path, name: str, low: int, seed: int) -> str:
    """80 documents of tokens from `low` on."""
    random = np.random.default_rng(seed)
    documents = [random.integers(low, low + 10, random.integers(1, 40)).tolist() for _ in range(80)]
    pq.write_table(pa.table({"tokens": documents}), folder / f"{name}.parquet", row_group_size=16)
    return str(folder / f"{name}.parquet")


@pytest.mark.parametrize("across", [True, False])
def test_a_mixture_in_a_config_trains_and_resumes(across: bool, tmp_path: Path) -> None:
    low, high = write(tmp_path, "low", 0, 1), write(tmp_path, "high", 10, 2)
    config: dict[str, Any] = {
        "task": {
            "kind": "corpus", "vocabulary": 21, "length": 16, "end": 20, "test": low, "across": across,
            "mixture": [{"path": low, "weight": {0: 1.0, 64: 0.2}}, {"path": high, "weight": 1}],
        },
        "model": GPT, "growth": {"kind": "exponential", "start": 8, "cap": 32}, "stages": {"every": {"samples": 64}},
        "budget": {"samples": 192}, "run": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    result = parse(config).fit()
    assert result.progress.samples == 192
    assert 0 < result.metrics["loss"] < 10
    assert parse(config).fit(resume=True).progress == result.progress
    with pytest.raises(ConfigError, match="task.mixture: "):
        config["task"]["mixture"][1]["weight"] = 3
        parse(config).fit(resume=True)


def test_labels_that_cross_no_boundary_are_counted(tmp_path: Path) -> None:
    spec = Corpus(path=write(tmp_path, "low", 0, 1), vocabulary=10, length=16, across=False)
    task = spec.build(None)
    batch = torch.utils.data.default_collate([task.train[k] for k in range(8)])
    assert task.items is not None
    ignored = (batch["document_ids"][:, 1:] != batch["document_ids"][:, :-1]).sum()
    assert 8 * 16 - ignored - 8 <= task.items(batch) <= 8 * 16 - ignored
    assert len(task.train) == spec.train_size()


def test_corpora_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "low", 0, 1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "exactly one of path, mixture"),
        ({"path": path, "mixture": [{"path": path}]}, "exactly one of path, mixture"),
        ({"mixture": [{"path": path, "weight": 0.0}]}, "weights of all 1 sets are 0"),
        ({"mixture": [{"path": path, "weight": {5: 1.0}}]}, "no weight from sample 0 on"),
        ({"mixture": []}, "mixture"),
        ({"path": str(tmp_path / "no*.parquet")}, "no file there"),
        ({"path": path, "column": "ids"}, "has no column ids"),
        ({"path": path, "vocabulary": 5}, "vocabulary=5: a document has tokens of 0 to 9"),
        ({"path": path, "length": 10**6}, "too few for one window"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            Corpus(**{"vocabulary": 10, **given}).train_size()
