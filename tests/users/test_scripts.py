"""Five scripts as users write them run with distgrow in few changed lines, counted as the guide tells them."""

import difflib
import os
import sys
from pathlib import Path

import pytest
import warm
from conftest import ROOT

HERE = Path(__file__).parent
SCRIPTS = ["mnist", "gpt", "ddp", "finetune", "module"]
NEEDS = {"finetune": "transformers", "module": "lightning"}


def changed(name: str, folder: str) -> tuple[int, int]:
    """Lines that come and lines that go, between the plain script and the one in a folder."""
    old, new = ((HERE / place / f"{name}.py").read_text().splitlines() for place in ("plain", folder))
    lines = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_with_a_growing_batch(name: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS.get(name, "torch"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(HERE / "growing" / f"{name}.py")
    finished = warm.run([sys.executable, script], environment, tmp_path, timeout_s=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_guide_counts_the_lines_and_they_are_no_more_than_accelerates(name: str) -> None:
    (written, gone), other = changed(name, "growing"), None
    if (HERE / "accelerated" / f"{name}.py").exists():
        other = changed(name, "accelerated")
        assert written <= other[0]
    against = "–" if other is None else f"+{other[0]} −{other[1]}"
    assert f"| +{written} −{gone} | {against} |" in (ROOT / "docs/guide.md").read_text(), (written, gone, other)
