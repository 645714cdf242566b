"""What a run's task refuses to build, `plan` refuses before it, in the same words."""

from functools import reduce

import pytest
from conftest import Commands

from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError
from distgrow.planning.check import check, problems

BASE = {"growth": {"kind": "constant", "start": 8}, "budget": {"samples": 64}}
RAVEN, TEXT, DIGITS = "task={kind: raven, rows: 100}", "task={kind: text}", "task={kind: digits}"
REFUSED = {
    "an mlp for puzzles": (RAVEN, "model={kind: mlp}"),
    "a ResNet for a text": (TEXT, "model={kind: resnet8}"),
    "a transformer for images": (DIGITS, "model={kind: gpt}"),
    "heads that do not divide": (TEXT, "model={kind: gpt, width: 10, heads: 4}"),
    "places that cannot be turned": (RAVEN, "model={kind: gpt, width: 12, heads: 4, positions: rotary}"),
    "nothing held out": ("task={kind: raven, rows: 100, features: 1, held_out: 0.1}",),
    "a model beside a target": ("task={kind: target, target: 'nowhere:task', tokens: 4}", "model={kind: mlp}"),
}


@pytest.mark.parametrize("overrides", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_built_is_refused_by_plan_and_before_ranks_are_started(overrides: tuple[str, ...]) -> None:
    run = parse(reduce(apply, overrides, BASE))
    with pytest.raises(ConfigError) as built:
        run.task.build(run.model)
    with pytest.raises(ConfigError) as checked:
        check(run)
    assert str(checked.value) == str(built.value)
    if run.task.kind != "target":  # whose data nobody can count
        assert str(built.value) in problems(run, run.controller(1))


def test_what_can_be_built_is_not_refused() -> None:
    for overrides in ((RAVEN,), (RAVEN, "model={kind: gpt, width: 8, heads: 2}"), (DIGITS, "model={kind: softmax}")):
        run = parse(reduce(apply, overrides, BASE))
        check(run)
        assert problems(run, run.controller(1)) == []


def test_plan_ends_with_the_exit_code_of_bad_input(distgrow: Commands) -> None:
    (distgrow.folder / "raven.yaml").write_text(
        "task: {kind: raven, rows: 100}\nmodel: {kind: mlp}\ngrowth: {kind: constant, start: 8}\n"
        "budget: {samples: 64}\n"
    )
    for verb in ("plan", "train"):
        finished = distgrow(verb, "raven.yaml")
        assert finished.code == 2
        assert "model.kind=mlp needs images" in finished.err
    assert not (distgrow.folder / "runs").exists()
