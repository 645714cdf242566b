"""A config is read strictly, and whatever is wrong with it is told by key and value, with what to write instead."""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distgrow.config.load import apply, load, parse
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.growth.auto import Auto
from distgrow.optim.sgd import SGD

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
BASE: dict[str, Any] = {
    "growth": {"kind": "exponential", "start": 16, "factor": 2.0, "cap": 256},
    "stages": {"every": {"epochs": 5}},
    "lr": {"base": 0.1, "rule": {"kind": "sqrt"}, "decay": {"kind": "cosine"}},
    "budget": {"epochs": 40},
}


def overridden(*overrides: str) -> Run:
    """BASE with overrides, as the command line has them."""
    values = BASE
    for override in overrides:
        values = apply(values, override)
    return parse(values)


def refusal(*overrides: str, world: int = 1) -> str:
    """Why BASE with overrides cannot be run."""
    with pytest.raises(ConfigError) as refused:
        overridden(*overrides).controller(world).check()
    return str(refused.value)


def full(path: Path) -> dict[str, Any]:
    """A config file with every default written out, but for what a run records."""
    return load(path).model_dump(mode="json", exclude={"lr": {"measured"}})


def key_paths(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of nested mappings, as the path to it."""
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from key_paths(value, (*above, key))


def owner_of(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The mapping that holds the last key of a path."""
    for part in path[:-1]:
        values = values[part]
    return values


@st.composite
def typos(draw: st.DrawFn, word: str) -> str:
    """`word` with one letter left out, added, changed, or swapped with the next."""
    at, letter = draw(st.integers(0, len(word) - 1)), draw(st.sampled_from(LETTERS))
    head, here, rest = word[:at], word[at], word[at + 1 :]
    return draw(st.sampled_from([head + rest, head + letter + here + rest, head + letter + rest,
                                 head + rest[:1] + here + rest[1:]]))  # fmt: skip


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_survives_being_written_out(path: Path, tmp_path: Path) -> None:
    run, copy = load(path), tmp_path / "copy.yaml"
    assert parse(run.model_dump(mode="json")) == run
    copy.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert load(copy) == run


@pytest.mark.parametrize(
    "growth",
    [
        "{kind: constant, start: 8}",
        "{kind: linear, start: 8, increment: 3}",
        "{kind: list, batches: [4, 8, 30]}",
        "{kind: exponential, factor: 1.1}",
        "{kind: late, cap: 64}",
        "{kind: matched, cap: 64, hold: 0.2}",
        "{kind: adaptive, norm: estimated}",
        "{kind: progress, cap: 64, dwell: {samples: 500}, early: 2.0}",
        "{kind: tracking, cap: 64, smoothness: 2.0}",
        "{kind: gns, cap: 64}",
        "{kind: cabs, cap: 64}",
        "{kind: temperature, cap: 64, plateau: {epochs: 1.0}}",
        "{kind: adascale, batches: {kind: steps, batches: [16, 32]}}",
        "{kind: tau_nice, samples: 99, smoothness: 1, largest_smoothness: 5, mu: 0.1, optimum_sq: 1, epsilon: 0.1}",
    ],
)
def test_every_growth_survives_being_written_out(growth: str) -> None:
    run = overridden(f"growth={growth}")
    assert parse(run.model_dump(mode="json")) == run


@given(st.from_regex(r"[-+]?([0-9]{1,4}(\.[0-9]{0,4})?|\.[0-9]{1,4})[eE][-+]?[0-9]{1,2}", fullmatch=True))
def test_exponents_are_numbers_however_they_are_written(text: str) -> None:
    assert apply({}, f"lr.base={text}") == {"lr": {"base": float(text)}}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "+1.e-3", ".1e-2"])
def test_a_thousandth_is_a_learning_rate(text: str) -> None:
    assert overridden(f"lr.base={text}").lr.base == 0.001


def test_a_file_and_its_overrides_are_one_config(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(BASE))
    assert load(file) == parse(BASE)
    assert load(file, ["growth.start=8", "growth.cap=64"]) == overridden(
        "growth={kind: exponential, start: 8, cap: 64}"
    )


@settings(max_examples=50)
@given(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=4), st.integers() | st.lists(st.integers()))
def test_an_override_sets_one_key_and_leaves_the_rest(path: list[str], value: Any) -> None:
    before = deepcopy(BASE)
    after = apply(BASE, f"{'.'.join(path)}={value}")
    assert before == BASE
    assert owner_of(after, tuple(path))[path[-1]] == value
    assert {**after, path[0]: None} == {**BASE, path[0]: None}


def test_a_new_kind_drops_the_keys_of_the_old_one_and_the_same_kind_keeps_them() -> None:
    assert apply(BASE, "growth.kind=constant")["growth"] == {"kind": "constant"}
    assert apply(BASE, "growth.kind=exponential") == BASE


def test_a_kind_that_would_drop_a_key_given_before_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("budget: {epochs: 1}")
    kind, key = "optimizer.kind=adamw", "optimizer.beta1=0.8"
    assert load(tmp_path / "a.yaml", [kind, key]).optimizer.model_dump()["beta1"] == 0.8
    assert load(tmp_path / "a.yaml", [kind, key, kind]).optimizer.model_dump()["beta1"] == 0.8
    for sgd in ("optimizer.clip=0.5", "optimizer.momentum=0.9"):
        with pytest.raises(ConfigError, match=f"{kind} drops {sgd}, which stands before it; give the kind first"):
            load(tmp_path / "a.yaml", ["optimizer.kind=sgd", sgd, kind])


# ── typing errors ───────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_typo_in_any_key_is_answered_with_the_right_one(data: st.DataObject) -> None:
    values = full(data.draw(st.sampled_from(CONFIGS)))
    path = data.draw(st.sampled_from(sorted(key_paths(values))))
    owner, key = owner_of(values, path), path[-1]
    typo = data.draw(typos(key))
    assume(typo and typo not in owner)
    owner[typo] = owner.pop(key)
    with pytest.raises(ConfigError) as refused:
        parse(values)
    told = str(refused.value)
    if key == "kind" and "needs a kind" in told:
        assert f"{'.'.join(path[:-1])}: needs a kind" in told
        return
    line = next(line for line in told.splitlines() if line.startswith(".".join((*path[:-1], typo)) + ": unknown key"))
    assert re.search(rf"allowed here: .*\b{key}\b", line)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_letter_left_out_is_put_back_by_did_you_mean(path: Path) -> None:
    for keys in key_paths(full(path)):
        values = full(path)
        owner, key = owner_of(values, keys), keys[-1]
        typo = key[:1] + key[2:]
        if len(key) >= 4 and key != "kind" and typo not in owner:
            owner[typo] = owner.pop(key)
            with pytest.raises(ConfigError) as refused:
                parse(values)
            assert f"{'.'.join((*keys[:-1], typo))}: unknown key; did you mean '{key}'" in str(refused.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("growth.strat=8", ["growth.strat", "did you mean 'start'"]),
        ("lr.decay.warmpu=0.1", ["lr.decay.warmpu", "did you mean 'warmup'"]),
        ("growth.kind=exponentail", ["growth.kind='exponentail'", "did you mean 'exponential'", "'linear'"]),
        ("lr.decay.kind=cosin", ["lr.decay.kind='cosin'", "did you mean 'cosine'", "'wsd'"]),
        ("optimizer.kind=adam", ["optimizer.kind='adam'", "did you mean 'adamw'"]),
        ("growth={start: 4}", ["growth: needs a kind", "'auto'", "'constant'"]),
        ("stages.every={minutes: 4}", ["stages.every.minutes", "epochs, samples, steps"]),
        ("budget={hours: 4}", ["budget.hours", "epochs, samples, steps, sfo"]),
        ("growth.start='16'", ["growth.start='16'", "integer"]),
        ("growth.start=16.5", ["growth.start=16.5", "integer"]),
        ("growth.start=true", ["growth.start=True", "integer"]),
        ("growth.start=0", ["growth.start=0", "greater than or equal to 1"]),
        ("growth.start=512", ["growth", "start=512 is above cap=256", "lower start or raise cap"]),
        ("growth.factor=1", ["growth.factor=1", "greater than 1"]),
        ("growth.factor=0.5", ["growth.factor=0.5", "greater than 1"]),
        ("growth={kind: list, batches: [4, 0]}", ["growth.batches.1=0", "greater than or equal to 1"]),
        ("growth={kind: list}", ["growth.batches: is missing"]),
        ("lr.base=Auto", ["lr.base='Auto'", "number, or 'auto'"]),
        ("lr.base=true", ["lr.base=True", "number"]),
        ("lr.base=0", ["lr.base=0", "greater than 0"]),
        ("lr.base=-1e-3", ["lr.base=-1e-3", "greater than 0"]),
        ("lr.base=.nan", ["lr.base=.nan", "finite"]),
        ("lr.base=.inf", ["lr.base=.inf", "finite"]),
        ("lr.decay={kind: wsd, warmup: 0.9, decay: 0.9}", ["lr.decay", "warmup=0.9", "decay=0.9", "at most 1"]),
        ("engine.max_micro=0", ["engine.max_micro=0", "greater than or equal to 1"]),
        ("engine={kind: deepspeed, delay: 2}", ["delay=2 is unknown to engine.kind=deepspeed", "leave delay out"]),
        ("engine={kind: fsdp, delay: 2}", ["delay=2 is unknown to engine.kind=fsdp", "leave delay out"]),
        ("engine.max_micro=Auto", ["engine.max_micro: 'Auto' must be a number of rows, or auto"]),
        ("run.noise.every=0", ["run.noise.every=0", "greater than or equal to 1"]),
        ("budget={epochs: 0}", ["budget.epochs=0", "greater than 0"]),
        ("budget={samples: 0}", ["budget.samples=0", "greater than or equal to 1"]),
        ("budget={}", ["budget", "exactly one of epochs, samples, steps, sfo", "none"]),
        ("budget={epochs: 1, samples: 9}", ["budget", "exactly one of", "got epochs and samples"]),
        ("stages.every={epochs: 1, samples: 9}", ["stages.every", "exactly one of", "got epochs and samples"]),
        ("stages.every={epochs: -1}", ["stages.every.epochs=-1", "greater than 0"]),
        ("stages.every={samples: 0}", ["stages.every.samples=0", "greater than or equal to 1"]),
        ("stages.every={epochs: 1.0e-4}", ["stages.every.epochs=0.0001", "shorter than one sample", "longer"]),
        ("growth=5", ["growth=5", "must be a mapping"]),
        ("lr.rule=sqrt", ["lr.rule='sqrt'", "write rule: {kind: sqrt}"]),
        ("run.dir=5", ["run.dir=5", "quote it"]),
        ("budget=null", ["budget=None"]),
        ("growth={kind: adaptive, epsilon: 0}", ["growth.epsilon=0", "greater than 0"]),
        ("growth={kind: adaptive, epsilon: -0.5}", ["growth.epsilon=-0.5", "greater than 0"]),
        ("growth={kind: adaptive, every: 0}", ["growth.every=0", "greater than or equal to 1"]),
        ("growth={kind: adaptive, norm: guessed}", ["growth.norm='guessed'", "exact", "estimated"]),
        ("growth={kind: tracking, cap: 64}", ["growth", "exactly one of kappa, smoothness", "none"]),
        ("growth={kind: tracking, kappa: 0, cap: 64}", ["growth.kappa=0", "greater than 0"]),
        ("growth={kind: gns, cap: 64, dwell: {epoch: 1}}", ["growth.min_stage.epoch", "did you mean 'epochs'"]),
        ("growth={kind: progress, cap: 64, dwell: {updates: 0}}", ["growth.min_stage.updates=0", "equal to 1"]),
        ("growth={kind: late, cap: 64, hold: 1.0}", ["growth.hold=1.0", "less than 1"]),
        ("growth={kind: adascale, batches: {kind: expo}}", ["growth.batches.kind='expo'", "'exponential'"]),
        ("growth={kind: temperature, plateau: {fall: 0.1}}", ["growth.plateau", "exactly one of epochs, samples"]),
        ("growth={kind: tau_nice, samples: 1437}", ["growth.smoothness: is missing"]),
    ],
)
def test_a_wrong_value_is_told_by_key_and_value_with_what_is_allowed(override: str, words: list[str]) -> None:
    told = refusal(override)
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["growth={kind: exponential, start: 8}", "budget={epochs: 400}"], ["1437 samples", "growth.cap"]),
        (["growth={kind: constant, start: 2000}"], ["growth.start=2000", "1437 samples", "lower it"]),
    ],
)
def test_a_schedule_that_cannot_be_says_what_to_change(overrides: list[str], words: list[str]) -> None:
    told = refusal(*overrides)
    for word in words:
        assert word in told


@pytest.mark.parametrize("override", ["growth.kind=optimal", "growth.kind=seesaw", "growth.kind=increase"])
def test_growth_with_stage_lengths_of_its_own_refuses_others(override: str) -> None:
    kind = override.partition("=")[2]
    assert f"growth.kind={kind} sets its own stage lengths: remove stages" in refusal("stages.power=1.0", override)


@pytest.mark.parametrize(
    "optimizer", ["optimizer={kind: sgd, momentum: 0.9}", "optimizer={kind: adamw}"]
)  # fmt: skip
def test_cabs_refuses_an_optimizer_that_its_rule_does_not_hold_for(optimizer: str) -> None:
    told = refusal("growth={kind: cabs, cap: 64}", "stages={}", optimizer)
    assert "growth.kind=cabs holds for SGD without momentum" in told
    assert "use growth.kind noise_scale, or critical_batch with kappa" in told
    overridden("growth={kind: cabs, cap: 64}", "stages={}", "optimizer.momentum=0")


@pytest.mark.parametrize("kind", ["{kind: noise_scale, cap: 64, ", "{kind: critical_batch, cap: 64, kappa: 1.0, "])
@pytest.mark.parametrize("beside", ["optimizer={kind: sgd}", "optimizer={kind: lamb}", "engine={kind: deepspeed}"])
def test_the_metric_of_adamw_is_refused_where_there_is_none(kind: str, beside: str) -> None:
    growth, adam = f"growth={kind}norm: preconditioned}}", "optimizer={kind: adamw}"
    told = refusal("stages={}", growth, adam, beside)
    assert "growth.norm=preconditioned goes by the second moments of AdamW" in told
    assert "or growth.norm=plain" in told
    overridden("stages={}", growth, adam)


def test_a_batch_below_the_world_names_both() -> None:
    told = refusal("growth={kind: constant, start: 3}", world=4)
    assert "batch=3" in told
    assert "world=4" in told


def test_settings_of_the_optimizer_without_a_kind_are_those_of_sgd() -> None:
    assert parse(apply(BASE, "optimizer.momentum=0.9")).optimizer == SGD(momentum=0.9)


def test_another_launcher_keeps_the_number_of_workers() -> None:
    launch = parse(apply(apply(BASE, "launch={kind: local, workers: 8, max_failures: 2}"), "launch.kind=ray")).launch
    assert (launch.kind, launch.workers, launch.max_failures) == ("ray", 8, 2)


def test_an_override_that_gives_two_units_is_told_how_to_replace_one() -> None:
    assert "an override that reads {samples: …} replaces the others" in refusal("budget.samples=9")


def test_what_has_no_default_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="budget: is missing; add it"):
        parse({key: value for key, value in BASE.items() if key != "budget"})


def test_growth_that_is_not_said_is_auto() -> None:
    assert parse({"budget": {"epochs": 4.0}}).growth == Auto()


def test_every_mistake_is_told_at_once() -> None:
    told = refusal("growth.strat=8", "lr.base=0", "budget={epochs: -1}").splitlines()
    assert [line.partition("=")[0].partition(":")[0] for line in told] == ["growth.strat", "lr.base", "budget.epochs"]
