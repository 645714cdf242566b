"""The manual has an example of every argument of fit(), and they run as they stand."""

import inspect
from pathlib import Path

import fit_reference
from conftest import ROOT
from page_scripts import execute

from distgrow import fit


def test_every_argument_has_an_example() -> None:
    assert [*fit_reference.examples()] == ["", *inspect.signature(fit).parameters]


def test_each_example_uses_its_argument() -> None:
    given = {"model", "loss", "train"}
    for name, code in fit_reference.examples().items():
        assert name in given | {""} or f"{name}=" in code, name


def test_the_examples_run(tmp_path: Path) -> None:
    execute((ROOT / "docs/fit_examples.py").read_text(encoding="utf-8"), tmp_path)
    assert len([*(tmp_path / "runs").iterdir()]) > 20
