"""Branches on several ranks and other engines: the run is that of its decided schedule, to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import in_ranks


def found(folder: Path, workers: int, *engines: str) -> dict[str, dict[str, Any]]:
    """What runs by each engine have given."""
    folder.mkdir()
    in_ranks("branched.py", str(folder), *engines, workers=workers)
    return json.loads((folder / "found.json").read_text())


def check(engine: dict[str, Any]) -> None:
    """Check one engine's runs: both branches have gone on, and all runs end as their schedules given beforehand."""
    assert engine["never"]
    assert engine["always"]
    assert engine["learned"]
    assert set(engine["never won"]) == {0}
    assert engine["always won"] == engine["learned won"] == [1, 1]
    for kind in ("always", "learned"):
        charged, evaluated = engine[f"{kind} probe"]
        assert charged == evaluated > 0


def test_two_ranks_of_torch_and_of_fsdp_go_back_and_on_to_the_bit(tmp_path: Path) -> None:
    engines = found(tmp_path / "two", 2, "torch", "fsdp")
    for engine in engines.values():
        check(engine)
    alone = found(tmp_path / "one", 1, "torch")["torch"]
    for engine in engines.values():
        for one, other in zip(alone["always losses"], engine["always losses"], strict=True):
            for windows, others in zip(one, other, strict=True):
                assert windows == pytest.approx(others, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engines", [("fsdp",), ("zero 1", "zero 2", "zero 3")])
def test_each_way_of_sharding_goes_back_and_on_to_the_bit(engines: tuple[str, ...], tmp_path: Path) -> None:
    if "zero 1" in engines:
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    for workers in (1, 2):
        for engine in found(tmp_path / f"{workers}", workers, *engines).values():
            check(engine)
