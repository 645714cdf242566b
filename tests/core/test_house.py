"""The package keeps the limits of size that its architecture names."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "distgrow"
FILES = sorted(PACKAGE.rglob("*.py"))
LINES, OF_A_FUNCTION = 300, 40


def size(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function, its signature among them, without its docstring."""
    docstring = [function.body[0]] if ast.get_docstring(function) else []
    return lines(function) - sum(map(lines, docstring))


def lines(node: ast.stmt) -> int:
    """Return the lines from the first to the last of a statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_has_more_than_forty_lines_beside_its_docstring(path: Path) -> None:
    functions = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {function.name for function in functions if size(function) > OF_A_FUNCTION}
    assert long == set()


def test_no_file_has_more_than_three_hundred_lines() -> None:
    long = {str(path.relative_to(PACKAGE)): path.read_text().count("\n") for path in FILES}
    assert {name for name, count in long.items() if count > LINES} == set()


def test_no_two_files_of_tests_have_one_name() -> None:
    """Else pytest takes the one for the other, and leaves it out."""
    names = [path.name for folder in ("core", "dist", "engine", "ray", "browser", "gpu") for path in _python(folder)]
    assert sorted(set(names)) == sorted(names)


def _python(folder: str) -> list[Path]:
    return [*(ROOT / "tests" / folder).glob("*.py")]


def test_every_folder_says_in_one_line_what_it_owns() -> None:
    folders = {path.parent for path in FILES}
    said = {folder: ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "" for folder in folders}
    assert {folder.name for folder, line in said.items() if not line.split("\n")[0].endswith((".", ":"))} == set()
