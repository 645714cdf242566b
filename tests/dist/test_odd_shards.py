"""Models of uncommon make end in shards on two ranks as whole in one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_ranks
from odd_shards import CASES, alone

QUICK = ["tied", "filled", "branched", "parted", "scaled", "given", "half"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks("odd_shards.py", str(folder), *QUICK, workers=2)
    return folder


def samples(run: Path) -> list[dict[str, Any]]:
    """What a hook has made of the model after each evaluation."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def compare(case: str, folder: Path, other: Path) -> None:
    found = torch.load(folder / f"{case}.pt", weights_only=True)
    expected, buffers = alone(case, other), ("running_mean", "running_var", "num_batches_tracked")
    assert found.keys() == expected.keys()
    near = 0.02 if case == "half" else 1e-5
    for name, value in expected.items():
        if not name.endswith(buffers):  # each rank's are of its own micro-batches
            assert type(value) is type(found[name])
            assert float((found[name] - value).norm()) <= near * float(value.norm()), name
    if (folder / case / "samples.jsonl").exists():
        made, wanted = ([row["made"] for row in samples(run)] for run in (folder / case, other))
        assert len(made) == 3
        for one, two in zip(made, wanted, strict=True):
            assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    else:
        assert case in ("parted", "half")


@pytest.mark.parametrize("case", QUICK)
def test_shards_on_two_ranks_end_with_the_parameters_of_one_process(case: str, two_ranks: Path, tmp_path: Path) -> None:
    compare(case, two_ranks, tmp_path)


@pytest.mark.slow
def test_compiled_units_end_with_the_parameters_of_one_process(tmp_path: Path) -> None:
    in_ranks("odd_shards.py", str(tmp_path), "compiled", workers=2)
    compare("compiled", tmp_path, tmp_path / "alone")


def test_every_case_has_a_test() -> None:
    assert {*QUICK, "compiled"} == CASES.keys()
