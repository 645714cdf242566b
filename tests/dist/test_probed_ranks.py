"""Exact probes are the same numbers on every engine and any number of ranks, and change nothing on any of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Commands, events, in_ranks, ledger, parameters

NUMBERS = ("norm", "loss", "smoothness", "curvature", "noise_trace", "noise_curvature", "critical_batch")


def found(folder: Path, workers: int, *engines: str) -> dict[str, list[dict[str, Any]]]:
    """The probes of a run by each engine, which must end as one without probes."""
    folder.mkdir()
    in_ranks("probing.py", str(folder), *engines, workers=workers)
    told = json.loads((folder / "found.json").read_text())
    assert all(engine["same"] for engine in told.values()), told
    return {name: events(folder / name, "probe") for name in told}


@pytest.mark.parametrize(
    ("alone", "together"),
    [
        ((), ("torch", "fsdp")),
        pytest.param(("fsdp",), ("hybrid",), marks=pytest.mark.slow),
        pytest.param(
            ("zero 1", "zero 2", "zero 3", "zero 3, bfloat16"), ("zero 1", "zero 2", "zero 3", "zero 3, bfloat16"),
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_engines_and_worlds_find_the_same_and_train_on_as_without(
    alone: tuple[str, ...], together: tuple[str, ...], tmp_path: Path
) -> None:
    if any("zero" in name for name in alone):
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    one, two = found(tmp_path / "one", 1, "torch", *alone), found(tmp_path / "two", 2, *together)
    reference = one["torch"]
    assert len(reference) > 2
    for probes in (one, two):
        for name, rows in probes.items():
            tolerance = 0.03 if "bfloat16" in name else 1e-3
            assert [row["samples"] for row in rows] == [row["samples"] for row in reference], name
            for row, wanted in zip(rows, reference, strict=True):
                assert row["evaluations"] == 41 * (6 + 2 * row["smoothness_products"])
                for number in NUMBERS:
                    assert row[number] == pytest.approx(wanted[number], rel=tolerance), (name, number)
    first = [probes[name][0] for probes in (one, two) for name in probes if "bfloat16" not in name]
    for number in NUMBERS:  # before the first update the parameters are the same to the last bit
        assert [row[number] for row in first] == pytest.approx([reference[0][number]] * len(first), rel=2e-5)


@pytest.fixture
def small(distgrow: Commands) -> tuple[str, ...]:
    """A network with BatchNorm and dropout, 100 samples, and probes of the first few of them."""
    (distgrow.folder / "small.py").write_text(
        """
import torch
from torch import nn
from distgrow import Task
def make(probed):
    train = [(torch.randn(3), torch.randn(1)) for _ in range(100)]
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    return Task(model=model, loss=loss, train=train, probe=train[:probed])
"""
    )
    return ("task={kind: target, target: 'small:make', args: {probed: 30}}", "model=null", "budget={samples: 300}")


@pytest.mark.slow
def test_a_probed_run_of_ranks_ends_bit_identical_and_its_ledger_tells_the_cost(
    distgrow: Commands, small: tuple[str, ...]
) -> None:
    often = ("run.probe.every_epochs=0.5", "run.checkpoint.every_steps=3")
    assert distgrow.train("plain", *small, workers=2).code == 0
    assert distgrow.train("probed", *small, *often, workers=2).code == 0
    plain, probed = distgrow.folder / "plain", distgrow.folder / "probed"
    assert (parameters(plain) == parameters(probed)).all()
    count = len(events(probed, "probe"))
    assert count >= 6
    assert ledger(probed) == {**ledger(plain), "probe": 30 * count}


@pytest.mark.slow
def test_impossible_probes_end_with_a_message(distgrow: Commands, small: tuple[str, ...]) -> None:
    few = distgrow.train("few", *small, "task.args.probed=1", "run.probe.every_epochs=1", workers=2)
    assert few.code == 1  # torchrun's own; its ranks end with 2
    assert "distgrow: the data set of exact probes has 1 sample, fewer than the 2 ranks" in few.err
    never = distgrow.train("never", "run.probe.every_epochs=0")
    assert never.code == 2
    assert "run.probe.every_epochs=0: " in never.err
    assert "Traceback" not in never.err
