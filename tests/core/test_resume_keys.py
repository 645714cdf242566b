"""The manual's table of keys that may change on resume says of every key of a config what a resume does."""

from collections.abc import Iterator

import pytest
from conftest import ROOT
from pydantic import BaseModel

from distgrow.config.run import Run
from distgrow.core.spec_errors import models_of
from distgrow.run.resume_check import BOUND, FREE, PLANNED, differences, under


def table() -> dict[str, str]:
    """The keys of the table → its answer."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    rows = text.partition("| key | on resume |\n| --- | --- |\n")[2].partition("\n\n")[0].splitlines()
    return {row.split("|")[1].strip(" `"): row.split("|")[2].strip() for row in rows}


def keys(spec: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key of a spec, dotted, through all kinds of its unions."""
    for name, field in spec.model_fields.items():
        inside = models_of(field.annotation)
        if not inside:
            yield above + name
        for model in inside:
            yield from keys(model, f"{above}{name}.")


KEYS = sorted({*keys(Run)})


def test_the_table_has_every_exception_of_the_code_and_no_other() -> None:
    answers = {key: answer for key, answer in table().items() if key != "every other key"}
    assert {key for key, answer in answers.items() if answer.startswith("may change")} == {*FREE}
    assert {key for key, answer in answers.items() if answer.startswith("may not")} == {*BOUND}
    assert {key for key, answer in answers.items() if answer.startswith("see")} == {*PLANNED}


@pytest.mark.parametrize("key", KEYS)
def test_a_resume_does_with_each_key_what_the_table_says(key: str) -> None:
    named = [entry for entry in table() if under(key, (entry,))]
    answer = table()[max(named, key=len) if named else "every other key"]
    before, after = {key: 1}, {key: 2}
    assert (differences(before, after) == []) == answer.startswith("may change")
    assert answer.startswith("see") == under(key, PLANNED)
