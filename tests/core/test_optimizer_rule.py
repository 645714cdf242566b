"""An optimizer's own law says how the learning rate follows the batch, where neither config nor policy does."""

import pytest

from distgrow.config.load import parse
from distgrow.core.lr import LR, Linear, Sqrt
from distgrow.core.progress import Progress
from distgrow.growth import Auto
from distgrow.growth.base import with_rule
from distgrow.growth.exponential import Exponential


def ratio(**keys: object) -> float:
    """How far the rate has followed a batch that has grown from 16 to 256."""
    given = {
        "task": {"kind": "digits"},
        "growth": {"kind": "exponential", "start": 16, "factor": 16, "cap": 256},
        "stages": {"every": {"samples": 1600}},
        "budget": {"samples": 20_000},
        **keys,
    }
    control = parse(given).controller(1)
    grown = Progress(stage=1, samples=1600, step=100)
    assert control.plan(grown).batch == 256
    return control.plan(grown).lr / control.plan(Progress()).lr


@pytest.mark.parametrize(
    ("kind", "follows"), [("sgd", 4), ("adamw", 4), ("muon", 4), ("lars", 4), ("lamb", 4), ("clars", 16)]
)
def test_each_optimizer_has_its_law(kind: str, follows: float) -> None:
    assert ratio(optimizer={"kind": kind}) == pytest.approx(follows)


@pytest.mark.parametrize(("rule", "follows"), [("constant", 1), ("sqrt", 4), ("linear", 16)])
@pytest.mark.parametrize("kind", ["sgd", "lars", "clars"])
def test_a_rule_that_is_given_comes_first(kind: str, rule: str, follows: float) -> None:
    assert ratio(optimizer={"kind": kind}, lr={"rule": {"kind": rule}}) == pytest.approx(follows)


def test_growth_in_the_place_of_a_decay_keeps_the_rate_constant() -> None:
    assert with_rule(Auto(), LR(), Linear()).rule is None
    assert with_rule(Exponential(start=8, factor=2), LR(), Linear()).rule == Linear()
    assert with_rule(Exponential(start=8, factor=2), LR(rule=Sqrt()), Linear()).rule == Sqrt()
