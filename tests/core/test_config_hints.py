"""A near miss in a config is answered with what to write, which is then read."""

from pathlib import Path

import pytest

from distgrow.config.load import apply, load, parse
from distgrow.core.errors import ConfigError
from distgrow.core.yaml_text import read_text

BASE = {"growth": {"kind": "exponential", "cap": 64}, "budget": {"epochs": 4}}


def refusal(override: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(apply(BASE, override))
    return str(refused.value)


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("stages={epochs: 1}", "stages: {every: {epochs: 1}}"),
        ("stages={samples: 1e5}", "stages: {every: {samples: 1e5}}"),
        ("stages={steps: [3, 4]}", "stages: {every: {steps: [3, 4]}}"),
        ("seed=7", "run: {seed: 7}"),
        ("run.every_s=5", "run: {checkpoint: {every_s: 5}}"),
        ("start=8", "growth: {start: 8}"),
        ("optimizer=adamw", "optimizer: {kind: adamw}"),
    ],
)
def test_a_key_one_level_too_high_is_answered_with_its_place(override: str, advice: str) -> None:
    assert f"write {advice}" in refusal(override)
    section, values = next(iter(read_text(advice, "advice").items()))
    assert section in parse({**BASE, section: {**BASE.get(section, {}), **values}}).model_fields_set


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("stages=5", "every, power"),
        ("stages.every=5", "epochs, samples, steps"),
        ("lr=0.1", "base, test, rule, decay"),
    ],
)
def test_a_number_in_place_of_a_mapping_is_answered_with_its_keys(override: str, keys: str) -> None:
    key = override.partition("=")[0].rpartition(".")[2]
    assert f"write {key}: {{…}}, with the keys {keys}" in refusal(override)


@pytest.mark.parametrize("override", ["lr={bsae: 0.1}", "lr={measurd: 0.1}", "measured=0.1"])
def test_a_key_that_only_a_run_writes_is_no_answer(override: str) -> None:
    assert "measured" not in refusal(override).removeprefix("measured")


def test_a_key_that_only_a_run_writes_is_read() -> None:
    assert parse({**BASE, "lr": {"base": "auto", "measured": 0.25}}).lr.initial == 0.25


def test_a_message_about_an_old_name_says_what_the_user_wrote() -> None:
    told = refusal("growth={kind: gns, cap: 64, rungs: 0}").splitlines()
    assert told[0].startswith("growth.stages_at_once=0: ")
    assert told[1:] == [
        "growth.kind: gns is read as noise_scale, its name today",
        "growth.stages_at_once: rungs is read as stages_at_once, its name today",
    ]


def test_old_names_are_told_when_a_config_is_read_and_todays_are_not(tmp_path: Path) -> None:
    file, told = tmp_path / "a.yaml", list[str]()
    file.write_text("growth: {kind: adascale, start: 8, batches: {kind: list, batches: [8, 16]}}\nbudget: {epochs: 1}")
    load(file, tell=told.append)
    assert told == ["growth.batches.kind: list is read as steps, its name today"]
    load(file, ["growth.batches.kind=exponential"], tell=pytest.fail)
