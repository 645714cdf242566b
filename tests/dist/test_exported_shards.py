"""The model out of shards: weights of every stage of ZeRO against the live modules', without deepspeed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

from conftest import in_ranks

from distgrow.checkpoint.export import export, weights_of

STAGES = [f"{zero}-{precision}" for zero in (1, 2, 3) for precision in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, dict[str, Tensor]]]]:
    folder = tmp_path_factory.mktemp("shards")
    in_ranks("exported.py", str(folder), workers=2)
    return folder, torch.load(folder / "found.pt", weights_only=True)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stage", STAGES)
def test_exported_weights_are_the_live_modules_bit_for_bit(runs: Any, stage: str, tmp_path: Path) -> None:
    folder, found = runs
    file, weights = export(folder / stage, tmp_path)
    assert same(load_file(file), found[stage]["live"])
    assert weights.state["last.weight"].data_ptr() == weights.state["model.weight"].data_ptr()
    exported = weights_of(folder / stage, average=True).state
    assert same(exported, found[stage]["average"])
    assert not torch.equal(exported["last.weight"], found[stage]["live"]["last.weight"])
