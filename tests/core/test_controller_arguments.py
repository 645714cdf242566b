"""A Controller refuses what no schedule is made of, in words, before the loop of its caller begins."""

from typing import Any

import pytest

from distgrow import Controller, Progress, budget, every, exponential, sqrt_lr
from distgrow.core.errors import ConfigError

PARTS: dict[str, Any] = {
    "growth": exponential(start=8, factor=2, cap=64),
    "stages": every(epochs=1),
    "lr": sqrt_lr(0.1),
    "budget": budget(epochs=6),
    "epoch": 1000,
}


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("growth", 32, "exponential"),
        ("growth", exponential, r"call it, exponential\(…\)"),
        ("growth", None, "exponential"),
        ("stages", 2, "every"),
        ("stages", None, "every"),
        ("lr", 0.1, "sqrt_lr"),
        ("lr", None, "sqrt_lr"),
        ("budget", 6, "budget"),
        ("epoch", [1, 2], "number of samples"),
        ("epoch", 10.5, "number of samples"),
        ("epoch", float("inf"), "number of samples"),
        ("world", 0, "number of ranks"),
        ("world", "2", "number of ranks"),
        ("max_micro", "auto", "number of rows"),
        ("max_micro", 0, "number of rows"),
    ],
)
def test_a_part_of_the_wrong_kind_is_refused_with_its_name_and_what_is_allowed(
    name: str, value: Any, way_out: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}=.*allowed is .*") as error:
        Controller(**{**PARTS, name: value})
    assert error.match(way_out)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_rank_beside_those_of_the_plan_gets_rows(world: int) -> None:
    plan = Controller(**PARTS, world=world).plan(Progress())
    assert [row for rank in range(world) for part in plan.rows(0, rank) for row in part] == list(range(8))
    for rank in (-1, world, world + 1):
        with pytest.raises(ConfigError, match=rf"rank={rank}: allowed is 0 to {world - 1}.*world={world}"):
            plan.rows(0, rank)
        with pytest.raises(ConfigError, match=rf"rank={rank}"):
            plan.sizes(rank)
