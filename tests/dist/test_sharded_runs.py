"""Runs of engine.kind=fsdp by the command line: other numbers of ranks, faults, files that would execute code."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Commands, events, ledger, torchrun
from test_failures import FAULTY, task
from test_resume import kill_group, until_step
from torch import Tensor

from distgrow.checkpoint.export import weights_of

FSDP = ("engine={kind: fsdp, max_micro: 6}", "optimizer={kind: adamw}", "lr.base=0.01")
OFTEN = "run.checkpoint={every_steps: 7, keep: 20}"


def flat(run: Path) -> Tensor:
    state = weights_of(run).state
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def test_a_nan_on_one_rank_is_skipped_on_all_and_counted(distgrow: Commands) -> None:
    (distgrow.folder / "faulty.py").write_text(FAULTY)
    words = (*task(poison=[7], rank=(1,)), "engine.kind=fsdp", "launch.workers=2")
    assert distgrow.train("run", *words).code == 0
    skips, counted = events(distgrow.folder / "run", "skip"), ledger(distgrow.folder / "run")
    assert counted["skipped"] == sum(skip["batch"] for skip in skips) > 0
    assert counted["applied"] == 1500
    assert flat(distgrow.folder / "run").isfinite().all()


@pytest.mark.slow
def test_a_killed_run_resumes_bit_identical(distgrow: Commands) -> None:
    assert distgrow.train("whole", *FSDP, OFTEN, workers=2).code == 0
    words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=killed", *FSDP, OFTEN]
    process = distgrow.start(*words, module=torchrun(2))
    until_step(distgrow.folder / "killed", 25, process)
    kill_group(process)
    assert distgrow.train("killed", *FSDP, OFTEN, workers=2, resume=True).code == 0
    assert torch.equal(flat(distgrow.folder / "whole"), flat(distgrow.folder / "killed"))
    assert {**ledger(distgrow.folder / "killed"), "replayed": 0} == ledger(distgrow.folder / "whole")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_another_mesh(distgrow: Commands) -> None:
    more = (*FSDP, OFTEN, "average={kind: ema, horizon: {samples: 300}}")
    assert distgrow.train("whole", *more, workers=2).code == 0
    for name, workers, changed in (("alone", 1, ()), ("hybrid", 4, ("engine.shard=hybrid", "engine.replicas=2"))):
        shutil.copytree(distgrow.folder / "whole", distgrow.folder / name)
        for newest in sorted((distgrow.folder / name / "checkpoints").iterdir())[3:]:
            shutil.rmtree(newest)
        assert distgrow.train(name, *more, *changed, workers=workers, resume=True).code == 0
        one, other = flat(distgrow.folder / "whole"), flat(distgrow.folder / name)
        assert float((one - other).norm() / one.norm()) <= 1e-5
        assert ledger(distgrow.folder / name)["applied"] == 1500
        last = events(distgrow.folder / name, "step")[-1]
        assert last["world"] == workers
        averages = [events(distgrow.folder / run, "eval")[-1]["average/loss"] for run in ("whole", name)]
        assert averages[1] == pytest.approx(averages[0], rel=1e-4)


class Exploit:
    """What an attacker would put into a checkpoint."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_would_execute_code_is_refused(distgrow: Commands) -> None:
    assert distgrow.train("run", *FSDP).code == 0
    newest = sorted((distgrow.folder / "run/checkpoints").iterdir())[-1]
    records = newest / "fsdp/.metadata"
    found = pickle.loads(records.read_bytes())
    found.planner_data = {**found.planner_data, "extra": Exploit(distgrow.folder / "broken-into")}
    records.write_bytes(pickle.dumps(found))
    manifest = json.loads((newest / "manifest.json").read_text())
    digest = subprocess.run(["sha256sum", str(records)], capture_output=True, text=True, check=True).stdout.split()[0]
    (newest / "manifest.json").write_text(json.dumps({**manifest, str(records.relative_to(newest)): digest}))
    for finished in (distgrow.train("run", *FSDP, resume=True), distgrow("export", "run", "out.safetensors")):
        assert finished.code == 2, finished.err
        assert "is not a checkpoint that can be loaded without executing code" in finished.err
        assert "Traceback" not in finished.err
    assert not (distgrow.folder / "broken-into").exists()


def test_a_checkpoint_of_another_engine_is_refused_by_name(distgrow: Commands) -> None:
    assert distgrow.train("run", *FSDP[1:]).code == 0
    finished = distgrow.train("run", *FSDP, resume=True)
    assert finished.code == 2
    assert "engine.kind" in finished.err
    assert "Traceback" not in finished.err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("engine={kind: fsdp, wrap: [Nothing]}",), "no module of class Nothing"),
        (("engine={kind: fsdp, wrap: Linear}",), "wrap=[Linear]"),
        (("engine={kind: fsdp, replicas: 2}",), "replicas=2 needs shard=hybrid"),
        (
            ("engine={kind: fsdp, shard: hybrid, replicas: 2}",),
            "engine.replicas=2 does not divide the number of ranks, 1",
        ),
        (("engine={kind: fsdp, shard: hybrid}",), "give engine.replicas, or use shard=full"),
        (("engine={kind: fsdp, offload: true, device: cpu}",), "engine.offload=true"),
        (("engine={kind: fsdp}", "optimizer.kind=adafactor"), "optimizer.kind=adafactor"),
        (("engine={kind: fsdp}", "sparsity={target: 0.5}"), "sparsity.target=0.5"),
    ],
)
def test_bad_settings_end_with_a_message_and_code_2(distgrow: Commands, overrides: tuple[str, ...], told: str) -> None:
    finished = distgrow.train("run", *overrides)
    assert finished.code == 2, finished.err
    assert told in finished.err
    assert "Traceback" not in finished.err
    assert not (distgrow.folder / "run").exists(), "the corrected command would find it"


@pytest.mark.fault
def test_the_workers_of_a_later_stage_take_the_shards_over(distgrow: Commands) -> None:
    whole = (*FSDP, "budget={samples: 1500}")
    assert distgrow.train("fixed", *whole).code == 0
    assert distgrow.train("grown", *whole, "launch.workers=[1, 4]").code == 0
    fixed, grown = distgrow.folder / "fixed", distgrow.folder / "grown"
    assert [(event["old"], event["new"]) for event in events(grown, "resize")] == [(1, 2), (2, 4)]
    assert float((flat(fixed) - flat(grown)).norm() / flat(fixed).norm()) < 1e-5
    assert ledger(grown) == ledger(fixed)
    assert ledger(grown)["applied"] == 1500
