"""Outcomes that are told one update later, on several ranks, and gradients that are averaged under the next update."""

from pathlib import Path

from conftest import in_ranks, ledger
from untold import ITEMS, check_empty, trained

from distgrow.distributed.world import World


def test_two_ranks_that_do_not_wait_make_the_run_of_those_that_do(tmp_path: Path) -> None:
    """To the bit, with growth, an average, a row that is not finite, no items at first, short memory, a resume."""
    in_ranks("untold.py", str(tmp_path), workers=2)
    check_empty(tmp_path / "empty", World())
    for name, delay in (("items", 0), ("late", 1)):
        alone, progress = trained(tmp_path / f"alone-{name}", World(), ahead=1, delay=delay, **ITEMS)
        moved, told = trained(tmp_path / name, World(), ahead=1, delay=delay, resume=True, **ITEMS)
        assert float((alone - moved).norm() / alone.norm()) < 1e-10
        assert progress.tokens == told.tokens > 0
        assert {**ledger(tmp_path / name), "replayed": 0} == ledger(tmp_path / f"alone-{name}")
