"""`distgrow probe-batch` in one process and in a group, on plain torch and on DeepSpeed."""

import json
from typing import Any

import pytest
from conftest import Commands, events, torchrun


def told(distgrow: Commands, folder: str) -> list[dict[str, Any]]:
    """What the branches came to."""
    (file,) = (distgrow.folder / folder).glob("probe-batch-step-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_group_finds_what_one_process_finds(distgrow: Commands) -> None:
    assert distgrow.train("run", "engine.precision=float64", "lr.rule.kind=constant").code == 0
    branch = ("probe-batch", "run", "--samples", "1024", "--up-to", "4")
    one = distgrow(*branch, "--out", "one")
    two = distgrow(*branch, "--out", "two", module=torchrun(2))
    assert (one.code, two.code) == (0, 0)
    assert one.out.splitlines()[0].split() == ["k", "batch", "lr", "updates", "training", "loss", "test", "loss"]
    assert one.out.splitlines()[:4] == two.out.splitlines()[:4]  # told once, by the first rank
    alone, together = told(distgrow, "one"), told(distgrow, "two")
    assert [line["event"] for line in alone] == ["branch", "branch", "branch", "result"]
    for left, right in zip(alone[:3], together[:3], strict=True):
        for number in ("batch", "lr", "updates", "loss", "test_loss", "evaluations"):
            assert left[number] == pytest.approx(right[number], rel=1e-9)
    assert alone[-1] == together[-1]
    assert not list(distgrow.folder.rglob(".branches*"))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_branches_of_deepspeeds_checkpoints_go_the_runs_own_way(distgrow: Commands, zero: int) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    engine = (f"engine={{kind: deepspeed, zero: {zero}}}", "optimizer={kind: adamw}", "lr.base=0.01")
    steady = (
        "growth={kind: constant, start: 16}",
        "run.checkpoint={every_steps: 30, keep: 9}",
        "budget={samples: 960}",
    )
    assert distgrow.train("run", *engine, *steady, workers=2).code == 0
    branched = distgrow(
        "probe-batch", "run/checkpoints/step-00000030", "--samples", "480", "--up-to", "2", module=torchrun(2)
    )
    assert branched.code == 0, branched.err
    first, second, _ = told(distgrow, "run")
    window = [step["loss"] for step in events(distgrow.folder / "run", "step")[30:]]
    ends = [0.5, *[1.0] * 7]  # the last quarter of 480 samples is seven batches and a half
    expected = sum(weight * loss for weight, loss in zip(ends, window[-8:], strict=True)) / 7.5
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert second["lr"] == pytest.approx(2**0.5 * first["lr"])


def test_a_path_that_is_none_ends_with_code_2(distgrow: Commands) -> None:
    finished = distgrow("probe-batch", "nowhere")
    assert finished.code == 2
    assert finished.err.startswith("distgrow: nowhere: there is no such folder")


@pytest.mark.slow
def test_a_group_finds_the_largest_stable_rate_that_one_process_finds(distgrow: Commands) -> None:
    settings = ("task={kind: digits}", "model={kind: softmax}", "growth={kind: constant, start: 16}", "lr.base=0.5")
    steady = ("engine.precision=float64", "budget={epochs: 1}", "--updates", "40")
    (distgrow.folder / "empty.yaml").write_text("{}\n")
    trial = ("range-test", "empty.yaml", *settings, *steady)
    one, two = distgrow(*trial, "--out", "one"), distgrow(*trial, "--out", "two", module=torchrun(2))
    assert (one.code, two.code) == (0, 0), two.err
    alone, together = (
        json.loads(next((distgrow.folder / folder).glob("range-test-*.json")).read_text()) for folder in ("one", "two")
    )
    assert alone["largest_stable_lr"] == together["largest_stable_lr"] is not None
    for left, right in zip(alone["runs"], together["runs"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-6)
    assert not list(distgrow.folder.rglob(".range-test*"))
