"""What updates show of noise is the same on every engine and world, before and after an interruption, and is logged."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Commands, events, in_ranks, parameters, torchrun
from test_resume import kill_group, until_step

EVERY = ("run.noise.every=1", "engine.max_micro=6")
HALVED = ("growth={kind: constant, start: 8}", "run.noise.every=1", "engine.max_micro=8")


def measured(folder: Path, workers: int, *engines: str) -> dict[str, torch.Tensor]:
    """What measured.py writes: (optimizer, update, of parts, of the batch and product)."""
    in_ranks("measured.py", str(folder / "measured.pt"), *engines, workers=workers)
    return torch.load(folder / "measured.pt", weights_only=True)


def compare(found: dict[str, torch.Tensor], name: str, tolerance: float) -> None:
    """All as in one process, where only the product of the first update is not known."""
    assert found["alone"].isnan().sum() == found["alone"][:, 0, 2].isnan().sum() == len(found["alone"])
    torch.testing.assert_close(found[name], found["alone"], rtol=tolerance, atol=0, equal_nan=True)


def engines(*names: str) -> tuple[str, ...]:
    """Those that there are here: DeepSpeed's need an extra."""
    return names if find_spec("deepspeed") else tuple(name for name in names if "zero" not in name)


def test_two_ranks_measure_what_one_process_does_of_the_same_parts(tmp_path: Path) -> None:
    names = engines("torch", "zero 1", "zero 2", "zero 3", "full", "hybrid")
    found = measured(tmp_path, 2, *names)
    for name in names:
        compare(found, name, 1e-5)
    by_one, by_two = found["alone, preconditioned"], found["preconditioned"]
    assert by_one[0].isnan().sum() == 3 and not by_one[1:].isnan().any()  # before the first step there is no metric
    torch.testing.assert_close(by_two, by_one, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_other_ways_of_zero_measure_the_same(workers: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    exact = ("zero 1", "zero 3", "zero 2, offload", "full", "grad_op", "every")
    half = ("zero 1, bfloat16", "zero 3, bfloat16", "full, bfloat16")
    found = measured(tmp_path, workers, *exact, *half)
    for name in exact:
        compare(found, name, 1e-5)
    for name in half:
        compare(found, name, 0.03)


def noise(run: Path) -> dict[str, Any]:
    """The noise of a run's last checkpoint."""
    return json.loads((max((run / "checkpoints").glob("step-*")) / "progress.json").read_text())["noise"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_logs_what_it_measures_and_trains_the_same(distgrow: Commands, workers: int) -> None:
    assert distgrow.train("watched", *EVERY, workers=workers).code == 0
    assert distgrow.train("unwatched", EVERY[1], "run.noise.every=1000", workers=workers).code == 0
    assert (parameters(distgrow.folder / "watched") == parameters(distgrow.folder / "unwatched")).all()
    steps = events(distgrow.folder / "watched", "step")
    assert noise(distgrow.folder / "watched")["variance"]["count"] == len(steps)
    assert noise(distgrow.folder / "unwatched")["variance"]["count"] == 1
    for step in steps[20:]:
        assert step["noise_trace"] > 0
        assert step["noise_scale"] is None or step["noise_scale"] == step["noise_trace"] / step["grad_sq"]


@pytest.mark.slow
def test_one_micro_batch_of_one_process_is_cut_in_two_to_be_measured(distgrow: Commands) -> None:
    assert distgrow.train("cut", *HALVED).code == 0
    steps = events(distgrow.folder / "cut", "step")
    assert {(step["micro"], step["accum"]) for step in steps if step["batch"] == 8} == {(4, 2)}
    assert noise(distgrow.folder / "cut")["grad_sq"]["count"] == len(steps)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed_it_remembers_the_same_noise(distgrow: Commands, workers: int) -> None:
    task = (*EVERY, "run.checkpoint.every_steps=7", "optimizer={kind: sgd, weight_decay: 0.01, clip: 1.0}")
    assert distgrow.train("whole", *task, workers=workers).code == 0
    words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=killed", *task]
    process = distgrow.start(*words, module=torchrun(workers))
    until_step(distgrow.folder / "killed", 30, process)
    kill_group(process)
    assert distgrow.train("killed", *task, resume=True, workers=workers).code == 0
    assert events(distgrow.folder / "killed", "resume")
    assert noise(distgrow.folder / "killed") == noise(distgrow.folder / "whole")
    assert (parameters(distgrow.folder / "killed") == parameters(distgrow.folder / "whole")).all()


@pytest.mark.slow
@pytest.mark.fault
def test_an_update_repeated_for_lack_of_memory_is_measured_once(distgrow: Commands) -> None:
    (distgrow.folder / "wounded.py").write_text((ROOT / "tests/dist/wounded.py").read_text())
    task = ("task={kind: target, target: 'wounded:small', args: {rows: 5}}", "model=null", "run.noise.every=1")
    assert distgrow.train("run", *task, "engine.max_micro=8", workers=2).code == 0
    assert events(distgrow.folder / "run", "oom")
    assert noise(distgrow.folder / "run")["variance"]["count"] == len(events(distgrow.folder / "run", "step"))
