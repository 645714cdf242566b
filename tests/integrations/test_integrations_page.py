"""The config that docs/integrations.md shows is one; its Python is run by the tests of the trainers."""

import re

import yaml
from conftest import ROOT

from distgrow.training.spec import RunSpec


def test_the_trackers_shown_are_ones() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/integrations.md").read_text(), flags=re.S)
    spec = RunSpec.model_validate(yaml.safe_load(shown)["run"])
    assert [tracker.kind for tracker in spec.trackers] == ["wandb", "mlflow"]
