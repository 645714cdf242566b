"""Tokens are a unit: of batches, budget, stages and intervals, by arithmetic if every sample has as many."""

from typing import Any

import pytest

from distgrow import budget, every
from distgrow.config.load import parse
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.growth.steps import Steps


def config(length: int = 16, **sections: Any) -> dict[str, Any]:
    return {"task": {"kind": "text", "length": length}, "budget": {"samples": 900}, **sections}


def strides(values: dict[str, Any]) -> list[tuple[int, int]]:
    run = parse(values)
    return [(stride.plan.batch, stride.updates) for stride in run.controller(1).forecast()]


def test_a_config_in_tokens_is_the_config_in_samples() -> None:
    tokens = config(
        budget={"tokens": 16_000}, stages={"every": {"tokens": 3_200}},
        growth={"kind": "exponential", "start": {"tokens": 128}, "cap": {"tokens": 512}},
    )  # fmt: skip
    samples = config(
        budget={"samples": 1_000}, stages={"every": {"samples": 200}},
        growth={"kind": "exponential", "start": 8, "cap": 32},
    )  # fmt: skip
    assert strides(tokens) == strides(samples)
    listed = config(growth={"kind": "steps", "batches": [{"tokens": 128}, {"tokens": 256}]})
    assert parse(listed).growth == Steps(batches=[8, 16])


def test_what_is_no_whole_number_of_samples_ends_with_the_sample_that_reaches_it() -> None:
    assert budget(tokens=101).in_samples(10) == Budget(samples=11)
    lengths = every(tokens=[15, 30, 15]).every.in_samples(10)
    assert lengths.samples == [2, 3, 1]  # boundaries at 15, 45 and 60 tokens: samples 2, 5 and 6


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"growth": {"kind": "constant", "start": {"tokens": 100}}}, r"growth\.start=\{tokens: 100\} is 6\.25 samples"),
        ({"growth": {"kind": "constant", "start": {"tokens": "many"}}}, "positive number of tokens"),
        ({"growth": {"kind": "constant", "start": {"tokens": -16}}}, "positive number of tokens"),
        ({"budget": {"tokens": 0}}, r"budget\.tokens"),
        ({"budget": {"tokens": 100, "epochs": 1}}, "exactly one of"),
        ({"task": {"kind": "digits"}, "growth": {"kind": "constant", "start": {"tokens": 64}}}, r"task\.tokens"),
    ],
)
def test_tokens_that_cannot_be_are_refused_by_their_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(config(**sections))


def test_without_tokens_of_a_sample_each_unit_says_what_to_give() -> None:
    values = {"task": {"kind": "digits"}, "growth": {"kind": "constant", "start": 8}}
    for section in ({"budget": {"tokens": 100}}, {"budget": {"epochs": 1}, "stages": {"every": {"tokens": 5}}}):
        with pytest.raises(ConfigError, match="tokens"):
            parse({**values, **section}).controller(1)
    for name in ("eval", "checkpoint"):
        run = {name: {"every_tokens": 100}}
        with pytest.raises(ConfigError, match=rf"run\.{name}\.every_tokens=100"):
            parse({**values, "budget": {"epochs": 1}, "run": run}).controller(1)


def test_counted_tokens_end_the_run_and_samples_lay_out_its_schedule() -> None:
    spent = budget(tokens=1_000, samples=50).in_samples(None)
    progress = Progress(step=9, samples=90, tokens=999)
    assert spent.left(progress, 10) > 0
    assert spent.left(Progress(tokens=1_000), 10) == 0
    assert spent.total(10) == 50


def test_a_progress_of_an_older_version_has_counted_no_tokens() -> None:
    old = {key: value for key, value in Progress(step=3).to_dict().items() if key != "tokens"}
    assert Progress.from_dict(old) == Progress(step=3)


def test_megatrons_schedule_changes_the_batch_once_its_tokens_are_consumed() -> None:
    growth = {"kind": "list", "schedule": "0:8 1.6K:16 6.4K:4"}
    consumed, found = 0, []
    for batch, updates in strides(config(budget={"tokens": 16 * 700}, growth=growth)):
        for _ in range(updates):
            found.append((consumed * 16, batch))
            consumed += batch
    expected = [(tokens, 8 if tokens < 1_600 else 16 if tokens < 6_400 else 4) for tokens, _ in found]
    assert found == expected
    constant = parse(config(growth={"kind": "steps", "schedule": "0:768"}))
    assert constant.growth == Steps(batches=[768])


@pytest.mark.parametrize(
    "schedule", ["", "8", "1K:8", "0:8 0:16", "0:8 2K:16 1K:32", "0:0", "0:8 1X:9", "0:8 0.5:9", 5]
)
def test_a_schedule_that_is_none_is_refused_with_the_form(schedule: Any) -> None:
    with pytest.raises(ConfigError, match=r"growth\.schedule=.*0:768 250B:1536"):
        parse(config(growth={"kind": "list", "schedule": schedule}))


def test_a_schedule_needs_tokens_of_a_sample_and_no_other_stages() -> None:
    growth = {"kind": "list", "schedule": "0:8 1K:16"}
    with pytest.raises(ConfigError, match="remove stages"):
        parse(config(growth=growth, stages={"every": {"epochs": 1}}))
    with pytest.raises(ConfigError, match=r"remove growth\.batches"):
        parse(config(growth={**growth, "batches": [8, 16]}))
    with pytest.raises(ConfigError, match="task.tokens"):
        parse({**config(growth=growth), "task": {"kind": "digits"}}).controller(1)
