"""A policy of what-if means what its YAML leaves to the run, or what its config file would train; or it is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Linear, NoDecay, Sqrt
from distgrow.core.stages import Stages
from distgrow.growth.controller import Controller
from distgrow.growth.exponential import Exponential
from distgrow.planning.what_if.candidates import Given, Setting, wanted
from distgrow.planning.what_if.observed import FEWEST_EVALUATIONS, observed
from distgrow.planning.what_if.outlook import what_if
from distgrow.report.runs import Record, read

EPOCH, EPOCHS = 1000, 10
COSINE = {"base": 0.3, "decay": {"kind": "cosine"}}
OWN: list[dict[str, Any]] = [
    {"growth": {"kind": "exponential", "start": 8, "cap": 64}, "stages": {"every": {"epochs": 2}}, "lr": COSINE},
    {"growth": {"kind": "exponential", "start": 8, "factor": 3.0, "cap": 64}, "stages": {"power": 1.0}},
    {"growth": {"kind": "linear", "start": 8, "increment": 3}, "stages": {"every": {"samples": [900, 700]}}},
    {"growth": {"kind": "late", "start": 8, "hold": 0.4, "cap": 64}, "lr": {"base": 0.3, "rule": {"kind": "linear"}}},
    {"growth": {"kind": "seesaw", "start": 8, "cap": 64}, "lr": COSINE},
    {"growth": {"kind": "constant", "start": 8}, "lr": {"base": 0.3, "decay": {"kind": "wsd", "warmup": 0.1}}},
    {"growth": {"kind": "list", "batches": [8, 24]}, "stages": {"every": {"steps": 300}}},
]


def setting(own: Mapping[str, Any], **others: Any) -> Setting:
    """What a run with these sections in its config shares with its policies."""
    given = Given.model_validate_json(json.dumps({"lr": {"base": 0.3}, **own}))
    return Setting(start=8, cap=64, lr=given.lr, samples=EPOCH * EPOCHS, epoch=EPOCH, own=given, **others)


def meant(common: Setting, policy: str | Mapping[str, Any]) -> Controller:
    """The decisions of a policy."""
    text = policy if isinstance(policy, str) else json.dumps(policy)
    ((_, values),) = wanted(common, [text], everything=False)
    return common.controller(values)


def filed(common: Setting, folder: Path, config: Mapping[str, Any]) -> Controller:
    """The decisions of a config file."""
    (folder / "given.yaml").write_text(yaml.safe_dump(dict(config)))
    return meant(common, str(folder / "given.yaml"))


def record(folder: Path, batches: Sequence[int] = (8,) * EPOCHS, config: Mapping[str, Any] | None = None) -> Record:
    """A run with a batch for each epoch, which is evaluated after each."""
    lines: list[dict[str, Any]] = [{"event": "start", "step": 0, "samples": 0, "time_s": 0.0}]
    step = samples = 0
    for batch in batches:
        for _ in range(EPOCH // batch):
            step, samples = step + 1, samples + batch
            place = {"step": step, "samples": samples, "time_s": 0.01 * step, "sfo": samples, "epoch": samples / EPOCH}
            shape = {"stage": 0, "batch": batch, "lr": 0.3, "world": 1, "grad_norm": None, "samples_per_s": 1e3}
            lines.append({"event": "step", **place, **shape, "loss": 1 + step**-0.5})
        lines.append({**lines[-1], "event": "eval", "error": 1 + step**-0.5})
    lines.append({"event": "end", "step": step, "samples": samples, "time_s": 0.01 * step, "reason": "done"})
    folder.mkdir(parents=True)
    plain = {"growth": {"kind": "constant", "start": 8}, "stages": {}, "lr": {"base": 0.3}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**plain, "budget": {"samples": samples}, **(config or {})}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read([str(folder)])[0]


# ── what a policy leaves out ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("own", OWN, ids=lambda own: own["growth"]["kind"])
def test_what_yaml_leaves_out_is_the_runs(own: dict[str, Any], tmp_path: Path) -> None:
    """A policy that names nothing but the run's own kind is the run itself, which its config file is, too."""
    itself = filed(setting(own), tmp_path, own)
    for given in ({"kind": own["growth"]["kind"]}, own["growth"], own):
        assert meant(setting(own), given) == itself


def test_growth_of_another_kind_takes_the_runs_cap_stages_and_lr_as_far_as_it_can(tmp_path: Path) -> None:
    lr = {"base": 0.3, "rule": {"kind": "linear"}, "decay": {"kind": "wsd", "decay": 0.5}}
    stages = {"every": {"epochs": 2.0}, "power": 1.0}
    own = setting({"growth": {"kind": "exponential", "cap": 64}, "stages": stages, "lr": lr})
    without = {key: value for key, value in lr.items() if key != "rule"}
    even = {"every": {"epochs": 2.0}}  # δ^m needs a factor
    for kind, whole in {
        "constant": {"growth": {}, "lr": lr, "stages": even},
        "matched": {"growth": {"cap": 64}, "lr": without},  # it brings its rule, and sets its stages
        "late": {"growth": {"cap": 64}, "lr": lr},
        "linear": {"growth": {"cap": 64}, "lr": lr, "stages": even},
    }.items():
        expected = filed(own, tmp_path, {**whole, "growth": {"kind": kind, **whole["growth"]}})
        assert meant(own, {"kind": kind}) == expected


def test_what_a_policy_gives_is_not_the_runs() -> None:
    own = setting(OWN[0])
    given = {"growth": {"kind": "exponential", "start": 4, "cap": 128, "factor": 4.0}, "stages": {"power": 0.5}}
    found = meant(own, {**given, "lr": {"base": 0.1, "decay": {"kind": "none"}}})
    assert isinstance(found.growth, Exponential)
    assert (found.growth.start, found.growth.cap, found.growth.factor) == (4, 128, 4.0)
    assert found.stages == Stages(power=0.5)
    assert (found.lr.base, found.lr.decay) == (0.1, NoDecay())


def test_the_rule_that_the_runs_optimizer_brings_is_that_of_a_policy_too() -> None:
    growth = {"kind": "exponential", "cap": 64}
    own = setting({"growth": {"kind": "constant"}}, rule=Linear())
    assert meant(own, {"growth": growth}).lr.rule == Linear()
    assert meant(own, {"growth": growth, "lr": {"rule": {"kind": "sqrt"}}}).lr.rule == Sqrt()


def test_what_a_config_file_leaves_out_is_at_its_default_but_for_start_and_base(tmp_path: Path) -> None:
    found = filed(setting(OWN[0]), tmp_path, {"growth": {"kind": "exponential", "cap": 64}})
    assert (found.growth.start, found.lr, found.stages) == (8, LR(base=0.3), Stages())


def test_schedules_with_a_name_are_the_same_whatever_the_run_had() -> None:
    one, other = (
        setting({"growth": {"kind": "constant"}}),
        setting({**OWN[0], "lr": {"base": 0.3, "rule": {"kind": "sqrt"}}}),
    )
    for name in one.all():
        assert meant(one, name) == meant(other, name)


def test_a_policy_of_a_recorded_run_is_completed_by_its_config(tmp_path: Path) -> None:
    config = {**OWN[0], "optimizer": {"kind": "clars"}, "task": {"kind": "text", "length": 32}}
    own = record(tmp_path / "run", config=config)
    given = "{growth: {kind: exponential, cap: {tokens: 2048}}, "
    whole = "lr: {decay: {kind: cosine}, rule: {kind: linear}}, stages: {every: {tokens: 64_000}}}"
    other = "lr: {decay: {kind: cosine}, rule: {kind: sqrt}}}"
    found = what_if(own, [f"{given}}}", given + whole, given + other]).prospects
    losses = {each.name: each.loss for each in found}
    assert losses[f"{given}}}"] == losses[given + whole] != losses[given + other]
    assert {each.batch for each in found} == {64}


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batches_and_stages_in_tokens_are_those_of_the_runs_samples(tmp_path: Path) -> None:
    own = setting({"growth": {"kind": "constant"}}, tokens=32)
    growth = {"kind": "exponential", "start": {"tokens": 512}, "cap": {"tokens": 2048}}
    given = {"growth": growth, "stages": {"every": {"tokens": 32_000}}}
    samples = {"growth": {"kind": "exponential", "start": 16, "cap": 64}, "stages": {"every": {"samples": 1000}}}
    assert meant(own, given) == filed(own, tmp_path, given) == meant(own, samples)
    with pytest.raises(ConfigError, match=r"growth.start=.*give a multiple of 32"):
        meant(own, {"kind": "constant", "start": {"tokens": 33}})


@pytest.mark.parametrize("given", ["growth: {kind: constant, start: {tokens: 512}}", "stages: {every: {tokens: 512}}"])
def test_tokens_of_a_run_that_does_not_say_how_many_a_sample_has_are_refused(given: str) -> None:
    growth = "" if "growth" in given else "growth: {kind: linear, cap: 64}, "
    with pytest.raises(ConfigError, match=r"tokens.*give .*samples"):
        meant(setting({"growth": {"kind": "constant"}}), f"{{{growth}{given}}}")


@pytest.mark.parametrize("section", ["growth", "lr", "stages"])
@pytest.mark.parametrize(
    "value", ["3", "[1]", "null", "word", "true", ".nan", "{1: 2}", "[{kind: late}]", "{kind: [1]}"]
)
@pytest.mark.parametrize("file", [False, True])
def test_a_section_that_is_none_is_refused_by_its_name(section: str, value: str, file: bool, tmp_path: Path) -> None:
    growth = "" if section == "growth" else "growth: {kind: exponential, cap: 64}, "
    policy = f"{{{growth}{section}: {value}}}"
    if file:
        (tmp_path / "given.yaml").write_text(policy)
        policy = str(tmp_path / "given.yaml")
    with pytest.raises(ConfigError, match=section):
        meant(setting(OWN[0]), policy)


def test_a_refusal_names_the_policy(tmp_path: Path) -> None:
    own = record(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--policy=.*lr=3: must be a mapping"):
        what_if(own, ["{growth: {kind: matched}, lr: 3}"])


@pytest.mark.parametrize("word", ["foo", "autoo", "wsd90", "3"])
def test_a_word_that_is_no_schedule_names_all_that_have_a_name(word: str, tmp_path: Path) -> None:
    own = record(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"--policy=.*name one of constant, .*cosine, .*wsd80, .*or give YAML"
    ) as error:
        what_if(own, [word])
    assert "auto," not in str(error.value)


# ── what a run shows ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch", [7, 8, 24, 64])
def test_the_largest_batch_is_one_of_growth_not_the_rest_that_joins_the_last_update(batch: int, tmp_path: Path) -> None:
    """10,000 samples are no whole number of some of these batches."""
    config = {"growth": {"kind": "constant", "start": batch}, "budget": {"samples": 10_000}}
    names = ["constant", "cosine", f"{{kind: steps, batches: [{batch}, 99]}}"]
    found = {each.name: each.batch for each in what_if(record(tmp_path / "run", [batch] * 10, config), names).prospects}
    assert found == {names[0]: batch, names[1]: batch, names[2]: 99}


@pytest.mark.parametrize(("epochs", "enough"), [(14, False), (15, True), (16, True)])
@pytest.mark.parametrize("grown", [10, 50])
def test_a_metric_is_fitted_from_a_quarter_of_the_samples_on(
    grown: int, epochs: int, enough: bool, tmp_path: Path
) -> None:
    """A run that grows has made most of its updates by then; evaluated once an epoch, it needs 15."""
    few = epochs // 4
    own = record(tmp_path / "run", [10] * few + [grown] * (epochs - few))
    if not enough:
        with pytest.raises(ConfigError, match=f"it needs {FEWEST_EVALUATIONS}"):
            observed(own, "error")
        return
    assert len(observed(own, "error").losses) == sum(epoch >= epochs / 4 for epoch in range(1, epochs + 1))
