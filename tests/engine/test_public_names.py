"""distgrow as a library: its names, fit() in a process, import times' causes."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import distgrow"],
        ["-m", "distgrow", "--help"],
        ["-m", "distgrow", "plan", str(ROOT / "configs/digits.yaml")],
        ["-m", "distgrow", "plan", str(ROOT / "configs/text.yaml")],
    ],
)
def test_torch_is_not_loaded_before_it_is_needed(arguments: list[str]) -> None:
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = {line.split("|")[-1].strip() for line in finished.stderr.splitlines()}
    assert not loaded & {"torch", "ray", "deepspeed", "matplotlib", "sklearn"}


def test_every_exported_name_exists() -> None:
    import distgrow

    assert all(getattr(distgrow, name) is not None for name in distgrow.__all__)


def test_a_train_config_of_every_kind_trains(tmp_path: Path) -> None:
    from distgrow.config.load import load

    overrides = ["budget={samples: 400}", "growth.start=8", "run.eval.every_epochs=1000"]
    for number, growth in enumerate(
        [
            ["growth={kind: constant, start: 8}"],
            ["growth={kind: linear, start: 8, increment: 4, cap: 32}", "stages={every: {steps: 5}}"],
            ["growth={kind: list, batches: [8, 12, 50]}", "stages={every: {samples: [100, 150]}}"],
            ["growth={kind: optimal, start: 8, factor: 2, cap: 32}", "lr.rule={kind: factor, factor: 1.2}"],
            ["growth={kind: seesaw, start: 8, cap: 32}", "lr={decay: {kind: cosine, warmup: 0.1}}"],
            ["growth={kind: increase, start: 8, cap: 32}", "lr={decay: {kind: step, every: {samples: 100}}}"],
            ["growth={kind: exponential, start: 8, cap: 32}", "lr={decay: {kind: wsd, warmup: 0.1}}"],
        ]
    ):
        config = "optimal" if "optimal" in growth[0] or "seesaw" in growth[0] or "increase" in growth[0] else "digits"
        run = load(ROOT / f"configs/{config}.yaml", [*overrides, *growth, f"run.dir={tmp_path / str(number)}"])
        result = run.fit()
        assert result.progress.ledger.applied == 400, growth
        assert 0 < result.metrics["accuracy"] <= 1
