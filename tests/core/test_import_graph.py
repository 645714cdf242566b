"""The size of an import graph is that of a package that is counted by hand, and distgrow's folders have no circle."""

from graphlib import CycleError
from pathlib import Path

import pytest
from conftest import ROOT
from import_graph import Counts, counts, files, folders

FILES = {
    "__init__.py": "",
    "app.py": "import toy.high.pick\nfrom toy.low import words, numbers\nimport json\n",
    "high/__init__.py": "from toy.high.pick import pick\n",
    "high/pick.py": "from typing import TYPE_CHECKING\nfrom toy.low.words import word\n"
    "if TYPE_CHECKING:\n    from toy.typed import Typed\n",
    "low/__init__.py": "",
    "low/words.py": "def word():\n    from toy.low.numbers import one\n    return one\n",
    "low/numbers.py": "one = 1\n",
    "typed.py": "class Typed: ...\n",
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A package of eight files."""
    for name, text in FILES.items():
        file = tmp_path / "toy" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "toy"


def test_between_files_imports_at_load_time_count(toy: Path) -> None:
    graph = files(toy)
    assert graph["toy.app"] == {"toy.high.pick", "toy.low.words", "toy.low.numbers"}
    assert graph["toy.high"] == {"toy.high.pick"}
    assert graph["toy.high.pick"] == {"toy.low.words"}
    assert graph["toy.low.words"] == frozenset()
    assert counts(graph) == Counts(rooms=8, floors=3, arrows=5)  # app or high → pick → words


def test_between_folders_every_import_counts(toy: Path) -> None:
    graph = folders(toy)
    assert graph["toy.app"] == {"toy.high", "toy.low"}
    assert graph["toy.high"] == {"toy.low", "toy.typed"}
    assert counts(graph) == Counts(rooms=5, floors=3, arrows=4)  # toy, app, high, low, typed


def test_a_circle_is_an_error(toy: Path) -> None:
    (toy / "typed.py").write_text("import toy.app\n")
    with pytest.raises(CycleError):
        counts(folders(toy))


def test_the_folders_of_distgrow_have_no_circle() -> None:
    size = counts(folders(ROOT / "distgrow"))
    assert size.rooms < 25
    assert size.floors <= 12
