"""Runs that report to Weights & Biases (offline) and MLflow (a local store): whole, killed and resumed, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import ROOT, TINY, Commands, events

from distgrow.tracking.spec import Point

UPDATES = 226
MANY = ("budget={samples: 6000}",)  # so that it is not over before anything was sent
FEW = ("budget={samples: 100}",)


def mlflow(uri: str = "sqlite:///mlflow.db") -> str:
    return f"{{kind: mlflow, uri: '{uri}', experiment: tests}}"


def trackers(*specs: str) -> str:
    return f"run.trackers=[{', '.join(specs)}]"


WANDB = "{kind: wandb, mode: offline, project: tests}"


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, a protocol buffer each."""
    from wandb.proto import wandb_internal_pb2 as protocol

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record: Any = protocol.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            parts = b""
            yield record


def rows(run: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """(ids, rows of the history) of all parts of a run, as Weights & Biases keeps them offline."""
    ids, found = set[str](), list[dict[str, Any]]()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                found.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return ids, found


def store(folder: Path) -> tuple[Any, Any]:
    """MLflow's client and the only run of the experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def history(client: Any, run: Any, key: str) -> dict[int, list[float]]:
    """The values of a metric, by update."""
    found: dict[int, list[float]] = {}
    for metric in client.get_metric_history(run.info.run_id, key):
        found.setdefault(metric.step, []).append(metric.value)
    return found


def until_handed_over(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Wait until Weights & Biases has been given the update `step`."""
    deadline, file = time.monotonic() + 240, run / "wandb/distgrow.json"
    while time.monotonic() < deadline and process.poll() is None:
        if file.is_file() and json.loads(file.read_text())["step"] >= step:
            return
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_and_resumed_both_services_hold_each_update_once(distgrow: Commands) -> None:
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package, reason=f"needs the extra '{package}'")
    both = (trackers(WANDB, mlflow()), *MANY, "run.checkpoint.every_steps=50", "engine.max_micro=6")
    words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=run", *both]
    process = distgrow.start(*words)
    until_handed_over(distgrow.folder / "run", 20, process)
    process.kill()  # Weights & Biases' own process ends with it, and loses what it has not written
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert distgrow.train("run", *both, resume=True).code == 0
    steps = events(distgrow.folder / "run", "step")
    losses = {step["step"]: step["loss"] for step in steps}
    assert len(losses) == UPDATES  # metrics.jsonl has those that were made again twice, the last of them here

    client, run = store(distgrow.folder)
    assert run.info.status == "FINISHED"
    assert run.data.params["growth.kind"] == "exponential"
    assert history(client, run, "step/loss") == {step: [loss] for step, loss in losses.items()}
    assert len(history(client, run, "eval/accuracy")) == 1

    ids, found = rows(distgrow.folder / "run")
    assert len(ids) == 1
    sent = [(row["_step"], row["step/loss"]) for row in found if "step/loss" in row]
    assert len(sent) == len(dict(sent))
    assert dict(sent) == losses


@pytest.mark.slow
def test_what_weights_and_biases_lost_when_a_run_was_killed_is_sent_again_and_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    for updates in (5, 60, 60, 130, 150):  # 5: before anything is written; 150: all, and a proper end
        command = [sys.executable, str(ROOT / "tests/dist/reported.py"), str(tmp_path), str(updates), "150"]
        finished = warm.run(command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        assert finished.returncode == (0 if updates == 150 else -signal.SIGKILL), finished.stderr
    ids, found = rows(tmp_path)
    assert ids == {"abc"}
    assert [row["_step"] for row in found] == list(range(150))
    assert [row["_step"] for row in found if "step/figure_0" in row] == list(range(150))
    assert [row["_step"] for row in found if "eval/figure_0" in row] == list(range(9, 150, 10))


def test_weights_and_biases_gets_what_metrics_jsonl_holds(distgrow: Commands) -> None:
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    assert distgrow.train("run", trackers(WANDB), *FEW, "run.log_every=5").code == 0
    _, found = rows(distgrow.folder / "run")
    sent = [(row["_step"], row["step/loss"], row["step/sfo"]) for row in found if "step/loss" in row]
    assert sent == [(step["step"], step["loss"], step["sfo"]) for step in events(distgrow.folder / "run", "step")]
    assert [row["_step"] for row in found if "eval/accuracy" in row] == [12]


@pytest.mark.slow
def test_mlflow_gets_what_metrics_jsonl_holds(distgrow: Commands) -> None:
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    assert distgrow.train("run", trackers(mlflow()), *FEW, "run.log_every=5").code == 0
    client, run = store(distgrow.folder)
    steps = events(distgrow.folder / "run", "step")
    assert history(client, run, "step/loss") == {step["step"]: [step["loss"]] for step in steps}
    assert run.info.run_name == "run"


def test_no_call_of_mlflow_holds_part_of_an_update_or_its_number_before_its_figures() -> None:
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    from distgrow.tracking.mlflow import METRICS, calls

    figures = {"step": 1.0, **{f"figure_{number}": 0.5 for number in range(29)}}
    points = [Point(kind="step", step=step, time_s=0.0, figures=figures) for step in range(100)]
    made = list(calls(points))
    assert all(len(metrics) <= METRICS for metrics in made)
    assert [metric.step for metrics in made for metric in metrics] == [step for step in range(100) for _ in figures]
    assert all(metrics[-1].key == "step/step" and len(metrics) % len(figures) == 0 for metrics in made)


def test_a_missing_package_is_told_before_anything_begins(distgrow: Commands) -> None:
    distgrow.warm = False  # a process of its own, which reads sitecustomize
    (distgrow.folder / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    finished = distgrow.train("run", trackers(WANDB))
    assert finished.code == 2
    assert "run.trackers: wandb is not installed; pip install 'distgrow[wandb]', or leave it out" in finished.err
    assert "Traceback" not in finished.err
    assert not (distgrow.folder / "run").exists()


@pytest.mark.slow
def test_a_store_that_cannot_be_opened_is_told_at_the_start(distgrow: Commands) -> None:
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    lost = trackers(mlflow("sqlite:////dev/null/mlflow.db"))
    finished = distgrow.train("run", lost, *FEW)
    assert finished.code == 2
    assert "run.trackers: mlflow cannot be opened" in finished.err
    assert "Traceback" not in finished.err
    assert distgrow.train("run", trackers(), *FEW, resume=True).code == 0


def test_what_cannot_be_a_tracker_is_refused(distgrow: Commands) -> None:
    unknown = distgrow("plan", str(ROOT / "configs/digits.yaml"), trackers("{kind: wandb, projct: p}"))
    assert unknown.code == 2
    assert "run.trackers.0.projct: unknown key; did you mean 'project'?" in unknown.err
    twice = distgrow("plan", str(ROOT / "configs/digits.yaml"), trackers(WANDB, WANDB))
    assert twice.code == 2
    assert "run.trackers" in twice.err
    assert "names wandb more than once" in twice.err


@pytest.mark.parametrize("damaged", ["", "{", "null", "[]", '{"step": "a", "held": null}', '{"held": [1]}'])
def test_a_damaged_record_of_what_was_handed_over_says_nothing(tmp_path: Path, damaged: str) -> None:
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    from distgrow.tracking.wandb import HandedOver

    (tmp_path / "distgrow.json").write_text(damaged)
    assert dict(HandedOver(tmp_path, "abc").held) == {}
    (tmp_path / "offline-run-1/run-abc.wandb").mkdir(parents=True)  # no file
    assert dict(HandedOver(tmp_path, "abc").held) == {}
