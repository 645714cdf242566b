"""Runs begun by an earlier version, under its names of kinds and keys, end as that version would have ended them."""

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distgrow.config.load import load
from distgrow.core.errors import RunError
from distgrow.core.progress import Progress

OLD = Path(__file__).parents[1] / "data/old_runs"
EXPECTED: Mapping[str, Any] = json.loads((OLD / "expected.json").read_text())


@pytest.fixture(params=EXPECTED)
def old_run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / request.param, tmp_path / request.param))


def like(found: Any, expected: Any) -> bool:
    """Return whether two records are equal, floats to the rounding of another machine."""
    if isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(like(found[key], expected[key]) for key in expected)
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    return found == expected


def test_a_run_of_an_earlier_version_ends_as_if_never_stopped(old_run: Path) -> None:
    expected = EXPECTED[old_run.name]
    result = load(old_run / "config.yaml", [f"run.dir={old_run}"]).fit(resume=True)
    assert result.finished
    # floats are equal to the bit on the machine that made them; another one's kernels round otherwise
    assert like(result.progress.to_dict(), Progress.from_dict(expected["progress"]).to_dict())
    assert result.progress.ledger.total == sum(expected["progress"]["ledger"].values())
    events = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    stages = [[event["step"], event["batch"]] for event in events if event["event"] == "stage"]
    assert [stage for stage in expected["stages"] if stage not in stages] == []
    last = max((old_run / "checkpoints").iterdir())
    state = torch.load(last / "engine.pt", weights_only=True)["model"]
    found = torch.cat([part.flatten() for part in state.values()]).numpy()
    wanted = np.frombuffer(base64.b64decode(expected["parameters"]), np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_key_that_was_changed_is_still_named_on_resume(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / "gns", tmp_path / "gns")
    run = load(folder / "config.yaml", [f"run.dir={folder}", "growth.hysteresis=1.5"])
    with pytest.raises(RunError, match=r"growth\.hysteresis: 1\.1 in the folder, 1\.5 now") as refused:
        run.fit(resume=True)
    assert "min_stage" not in str(refused.value)
    assert "kind" not in str(refused.value)
