"""What a rank sends in an update is what the page on sharded models says, for each sharding."""

import json
from pathlib import Path

import pytest
from conftest import in_ranks
from traffic import ACCUM, network

RANKS, REPLICAS = 4, 2


def theory(sharding: str, micro_batches: int) -> float:
    """Bytes of an update by the numbers of parameters in units and beside them."""
    model, share = network(), (RANKS - 1) / RANKS
    units = 4 * sum(p.numel() for p in model[1].parameters())
    rest = 4 * sum(p.numel() for p in model.parameters()) - units
    gathered, reduced = (2 * units + rest) * micro_batches, units + rest
    if sharding == "hybrid":
        within = RANKS // REPLICAS
        across = 2 * (reduced / within) * (REPLICAS - 1) / REPLICAS
        return (gathered + reduced) * (within - 1) / within + across
    if sharding == "full, every":
        return (gathered + reduced * micro_batches) * share
    if sharding == "full":
        return (gathered + reduced) * share
    return (reduced / (2 if sharding == "half" else 1) + reduced) * share


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    file: Path = tmp_path_factory.mktemp("traffic") / "found.json"
    in_ranks("traffic.py", str(file), workers=RANKS)
    return json.loads(file.read_text())


@pytest.mark.parametrize("sharding", ["full", "full, every", "grad_op", "hybrid", "half"])
def test_an_update_sends_what_theory_says(sharding: str, sent: dict[str, float]) -> None:
    for accum in ACCUM:
        assert sent[f"{sharding} {accum}"] == pytest.approx(theory(sharding, accum), rel=0.02), accum


def test_whole_parameters_make_an_update_cost_the_same_however_many_micro_batches_it_has(
    sent: dict[str, float],
) -> None:
    assert sent["grad_op 3"] == sent["grad_op 1"]
