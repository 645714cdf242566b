"""The page of the formulas: every one is there, with a source, and with the files that really use it."""

import inspect
import re

import pytest
import theory_reference
from conftest import ROOT

from distgrow.theory import (
    allocation,
    experts,
    extrapolation,
    finite_sum,
    noise,
    parts,
    pruning,
    samplings,
    sgd,
    staged,
    staleness,
)

MODULES = (sgd, staged, noise, allocation, finite_sum, parts, samplings, staleness, experts, extrapolation, pruning)
PAGE = theory_reference.page()
ROWS = {found[1]: found[0] for found in re.finditer(r"^\| `(\S+)` \| .* \|$", PAGE, re.M)}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_function_and_class_has_a_row_with_its_source(module: object) -> None:
    for name, thing in inspect.getmembers(module, lambda thing: inspect.isfunction(thing) or inspect.isclass(thing)):
        if thing.__module__ == getattr(module, "__name__", "") and not name.startswith("_"):
            assert theory_reference.source(thing.__doc__), f"{name} names no source"
            assert theory_reference.source(thing.__doc__) in ROWS[name]


def test_the_package_has_no_module_of_formulas_that_the_page_lacks() -> None:
    files = {path.stem for path in (ROOT / "distgrow/theory").glob("*.py")} - {"__init__", "numbers"}
    assert files == set(theory_reference.MODULES)


@pytest.mark.parametrize(
    ("formula", "users"),
    [
        ("cabs_batch", {"growth/cabs.py"}),
        ("FiniteSum.best_batch", {"growth/tau_adaptive.py", "growth/tau_nice.py"}),  # by way of best_whole_batch
        ("Tradeoff.least_sfo", {"critical_batch/sweep.py", "planning/forecast.py", "planning/table.py"}),
        ("directed_critical_batch", {"growth/critical_batch.py", "training/evaluator.py"}),
        ("pl_rate", set()),
        ("Staged.floor", set()),  # math.floor is none
        ("Staged.bound", set()),  # sgd.bound is none
    ],
)
def test_a_formula_names_exactly_the_files_that_use_it(formula: str, users: set[str]) -> None:
    assert set(re.findall(r"`([\w/]+\.py)`", ROWS[formula])) == users
    assert ("for tables and tests" in ROWS[formula]) == (not users)


def test_the_example_prints_the_number_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    code = PAGE.split("```python\n")[1].split("```")[0]
    exec(code, {})
    told = re.search(r"about (\S+) samples", code)
    assert told is not None
    assert float(capsys.readouterr().out) == pytest.approx(float(told[1]), abs=0.005)
