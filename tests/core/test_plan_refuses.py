"""What a run's task refuses to build, `plan` refuses before it, in the same words."""

from functools import reduce

import pytest
from conftest import Commands

from distgrow.config.load import apply, parse
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.engine.fsdp.spec import FSDP
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


HYBRID = "engine={kind: fsdp, shard: hybrid, replicas: 3}"
SPLIT = {
    "ranks throughout": ("launch.workers=2",),
    "the ranks of a later stage": (
        "growth={kind: exponential, start: 8, cap: 32}",
        "stages={every: {samples: 64}}",
        "budget={samples: 640}",
        "launch.workers={0: 3, 1: 2}",
    ),
}


@pytest.mark.parametrize("overrides", SPLIT.values(), ids=SPLIT)
def test_replicas_that_do_not_divide_the_ranks_are_refused_by_plan_and_before_ranks_are_started(
    overrides: tuple[str, ...],
) -> None:
    told = "engine.replicas=3 does not divide the number of ranks, 2: give one of 1, 2, or other launch.workers"
    run = parse(reduce(apply, (HYBRID, *overrides), BASE))
    with pytest.raises(ConfigError, match=told):
        check(run)
    assert told in problems(run, run.controller())
    for replicas in (1,) if run.launch.elastic else (1, 2):
        fitting = run.model_copy(update={"engine": FSDP(shard="hybrid", replicas=replicas)})
        check(fitting)
        assert problems(fitting, fitting.controller()) == []


def test_ranks_of_a_stage_that_is_over_do_not_matter() -> None:
    overrides = (HYBRID, *SPLIT["the ranks of a later stage"], "launch.workers={0: 2, 1: 3}")
    run = parse(reduce(apply, overrides, BASE))
    with pytest.raises(ConfigError, match=r"replicas=3 .* ranks, 2"):
        check(run)
    over = Progress(stage=1).repeat(8, 8)
    check(run, stands_at=lambda: over)


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
