"""A run under another trainer is recorded as fit() records its own, and `distgrow report` reads it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import events
from problem import ROWS, Rows, controller, fitted

from distgrow.core.errors import ConfigError
from distgrow.report.runs import read
from distgrow.report.write import write

EXACT = ("step", "samples", "epoch", "stage", "batch", "micro", "accum", "world", "lr", "sfo", "sfo_applied")


def check(recorded: Path, reference: Path) -> None:
    """Check that the lines are those of fit(), its times aside, and that a report can be made of them."""
    for kind, keys in {"step": EXACT, "stage": ("step", "samples", "stage", "batch", "lr")}.items():
        lines, expected = events(recorded, kind), events(reference, kind)
        assert [[line[key] for key in keys] for line in lines] == [[line[key] for key in keys] for line in expected]
    for key in ("loss", "grad_norm"):
        found = [line[key] for line in events(recorded, "step")]
        assert found == pytest.approx([line[key] for line in events(reference, "step")], rel=1e-9)
    assert events(recorded, "end")[-1]["reason"] == "done"
    assert "report.html" in write([str(recorded), str(reference)], str(recorded / "out"))
    assert read([str(recorded)])[0].epoch == pytest.approx(ROWS)


def test_under_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    from test_transformers import trainer

    fitted(tmp_path / "fit")
    run = trainer(tmp_path / "run", record=tmp_path / "record", logging_steps=1, save_steps=45, eval_strategy="epoch")
    run.train()
    check(tmp_path / "record", tmp_path / "fit")
    assert len(events(tmp_path / "record", "eval")) == math.ceil(900 / ROWS)
    logged = [line for line in run.state.log_history if "loss" in line]
    steps = events(tmp_path / "record", "step")
    for key in ("batch", "stage", "samples", "sfo"):
        assert [line[key] for line in logged] == [line[key] for line in steps]
    resumed = trainer(tmp_path / "run", record=tmp_path / "record", save_steps=45, eval_strategy="epoch")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-45"))
    assert [line["step"] for line in events(tmp_path / "record", "resume")] == [45]
    assert list(read([str(tmp_path / "record")])[0].steps["step"]) == [line["step"] for line in steps]
    again = trainer(tmp_path / "again", record=tmp_path / "record")
    with pytest.raises(ConfigError, match="record=.*give record another folder"):
        again.train()


def test_under_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra 'lightning'")
    from test_lightning import QUIET, GrowingNet

    from distgrow.integrations.lightning import Growth

    class Shown(lightning.Callback):
        """What a progress bar is given after each update."""

        def __init__(self) -> None:
            self.lines: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.lines.append({name: float(value) for name, value in trainer.progress_bar_metrics.items()})

    class Scored(GrowingNet):
        """Logs a metric."""

        def validation_step(self, batch: Any) -> None:
            self.log("score", float(len(batch["x"])))

    fitted(tmp_path / "fit")
    shown = Shown()
    growth = Growth(controller(), Rows(), record=tmp_path / "record")
    trainer = lightning.Trainer(**QUIET, callbacks=[growth, shown])
    trainer.fit(Scored(), val_dataloaders=torch.utils.data.DataLoader(Rows(), batch_size=ROWS))
    check(tmp_path / "record", tmp_path / "fit")
    assert {line["score"] for line in events(tmp_path / "record", "eval")} == {float(ROWS)}
    steps = events(tmp_path / "record", "step")
    for key in ("batch", "stage", "samples", "sfo", "lr"):
        assert [line[key] for line in shown.lines] == pytest.approx([line[key] for line in steps], rel=1e-6)
