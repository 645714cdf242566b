"""The scripts of docs/from/ train as they stand, before and after their diffs."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, events, ledger
from page_scripts import after, diffs, execute, flat, patched, scripts

from distgrow.config.load import load

#: Batches of the schedule that the pages share, each for an epoch.
SIZES = [16, 32, 64, 128]


def updates(rows: int) -> int:
    """Count the updates of four epochs, stage by stage: a stage ends with the update that reaches its epoch's end."""
    samples = steps = 0
    for stage, size in enumerate(SIZES, start=1):
        while samples < stage * rows:
            samples, steps = samples + size, steps + 1
    return steps


def test_every_page_of_a_way_in_shows_the_script_before_and_after() -> None:
    pages = sorted((ROOT / "docs/from").glob("*.md"))
    assert len(pages) == 7
    for page in pages:
        name = f"from/{page.name}"
        (script,) = scripts(name).values()
        for diff in diffs(name):
            compile(patched(script, diff), name, "exec")
        assert "\n## Before\n" in page.read_text()
        assert "\n## After" in page.read_text()
        assert page.read_text().split("\n\n")[1].startswith("After this page")


def test_from_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    execute(scripts("from/transformers.md")["train.py"], tmp_path / "before")
    names = execute(after("from/transformers.md"), tmp_path / "after")
    state = names["trainer"].state
    assert state.epoch == 4
    assert state.global_step == updates(2000)


def test_from_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="needs the extra 'lightning'")
    execute(scripts("from/lightning.md")["train.py"], tmp_path / "before")
    names = execute(after("from/lightning.md"), tmp_path / "after")
    assert names["trainer"].global_step == updates(2000)
    assert names["trainer"].current_epoch == 4


def test_from_accelerate_the_parameters_are_those_of_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'transformers'")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    execute(scripts("from/accelerate.md")["train.py"], tmp_path / "before")
    looped = execute(after("from/accelerate.md"), tmp_path / "looped")
    execute(after("from/ddp.md"), tmp_path / "fitted")
    last = max((tmp_path / "fitted/runs/mine/checkpoints").glob("step-*"))
    fitted = torch.load(last / "engine.pt", weights_only=True)["model"]
    assert torch.equal(flat(looped["network"].state_dict()), flat(fitted))
    saved = json.loads((tmp_path / "looped/runs/state/progress.json").read_text())
    assert saved["ledger"]["applied"] == 4 * 1797


def test_an_own_project_trains_without_ray_as_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/from/own-project-on-ray.md").read_text()
    (tmp_path / "mytask.py").write_text(after("from/own-project-on-ray.md"))
    config = tmp_path / "my.yaml"
    config.write_text(page.split('```yaml title="my.yaml"\n')[1].split("```")[0])
    settings = yaml.safe_load(config.read_text())
    assert Path(settings["run"]["dir"]).is_absolute()  # a relative one would lie in the package that Ray unpacks
    monkeypatch.syspath_prepend(str(tmp_path))
    run = load(str(config), ["launch.kind=local", "launch.workers=1", f"run.dir={tmp_path / 'run'}"])
    run.fit(resume=False)
    assert ledger(tmp_path / "run")["applied"] == 4 * 2000
    assert sorted({step["batch"] for step in events(tmp_path / "run", "step")} - {2000 % 128}) >= SIZES
