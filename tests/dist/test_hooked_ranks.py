"""Hooks on several ranks: what one rank asks for, all do; what one raises, all raise."""

from pathlib import Path

from conftest import in_ranks


def test_what_the_hook_of_one_rank_wants_or_raises_is_the_same_on_all(tmp_path: Path) -> None:
    in_ranks("hooked.py", str(tmp_path), workers=2)
    for method, best in (("after_update", 5), ("after_eval", 6)):
        names = {path.name for path in (tmp_path / method / "checkpoints").glob("step-*")}
        assert f"step-{best:08d}" in names
