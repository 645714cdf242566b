"""The configs of the related systems train to their end, as they are."""

from pathlib import Path

import pytest
from conftest import ROOT, Commands, events

#: Share of the first test loss that may be left at the end; puzzles are only begun to be learned.
LEFT = {"experts": 0.9}
CONFIGS = sorted((ROOT / "configs/seeds").glob("*.yaml"))
#: Configs that start a Ray cluster.
RAY = {"async"}
TRIED = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.ray, pytest.mark.slow] if path.stem in RAY else [])
    for path in CONFIGS
]


@pytest.mark.parametrize("config", TRIED)
def test_the_config_of_a_related_system_trains_and_learns(config: Path, distgrow: Commands) -> None:
    assert distgrow("plan", str(config)).code == 0
    assert distgrow("train", str(config), "run.dir=run").code == 0
    run = distgrow.folder / "run"
    assert events(run, "end")[-1]["reason"] == "done"
    losses = [line["loss"] for line in events(run, "eval")]
    assert losses[-1] < LEFT.get(config.stem, 0.5) * losses[0]


def test_the_page_of_related_systems_names_each_config() -> None:
    page = (ROOT / "docs/related.md").read_text()
    assert CONFIGS
    for config in CONFIGS:
        assert f"../configs/seeds/{config.name}" in page
