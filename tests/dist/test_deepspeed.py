"""DeepSpeed's ZeRO 1–3, and FSDP, are the same run as plain torch: parameters, ledger, interruptions, refusals."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from optimizers import OPTIMIZERS, RESUMED, union
from test_failures import FAULTY, task
from test_resume import kill_group, until_step
from torch import nn

from distgrow.checkpoint.export import weights_of
from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.engine.compatible import check_compatible
from distgrow.engine.spec import DeepSpeed, Torch
from distgrow.growth.constant import Constant
from distgrow.optim import OptimizerSpec

pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

from conftest import ROOT, TINY, Commands, events, in_ranks, ledger, torchrun

OFTEN = ("run.checkpoint={every_steps: 7, keep: 20}", "optimizer={kind: adamw}", "lr.base=0.01", "engine.max_micro=6")


def engine(zero: int) -> str:
    return f"engine={{kind: deepspeed, zero: {zero}}}"


def checkpoints(run: Path) -> list[Path]:
    """The oldest first."""
    return sorted((run / "checkpoints").iterdir())


def parameters(run: Path) -> torch.Tensor:
    """All parameters of a run's last checkpoint, flat, by DeepSpeed's own tool."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state: Any = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints(run)[-1]), tag="deepspeed")
    return torch.cat([state[name].detach().flatten() for name in sorted(state)])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_every_optimizer_agrees_between_torch_and_every_stage_of_zero(workers: int, tmp_path: Path) -> None:
    in_ranks("parity.py", str(tmp_path), workers=workers)
    found = torch.load(tmp_path / "parameters.pt", weights_only=True)
    assert {spec().name for spec in union() if not spec().sharded_fault()} <= OPTIMIZERS.keys()
    for optimizer, where in RESUMED.items():
        assert torch.equal(found[f"{where}, {optimizer}, resumed"], found[f"{where}, {optimizer}"])
    for optimizer in OPTIMIZERS:
        reference = found[f"torch, {optimizer}"]
        for zero in ("zero 1", "zero 2", "zero 3", "fsdp"):
            assert apart(reference, found[f"{zero}, {optimizer}"]) <= 1e-6, f"{zero}, {optimizer}"
            exported = weights_of(tmp_path / f"{zero}-{optimizer}").state.values()
            assert torch.equal(torch.cat([value.flatten() for value in exported]), found[f"{zero}, {optimizer}"])
            assert ledger(tmp_path / f"{zero}-{optimizer}") == ledger(tmp_path / f"torch-{optimizer}")
            steps = [events(tmp_path / f"{name}-{optimizer}", "step") for name in ("torch", zero)]
            for one, other in zip(*steps, strict=True):
                exact = ("step", "samples", "stage", "batch", "micro", "accum", "lr", "sfo")
                assert [one[key] for key in exact] == [other[key] for key in exact]
                for key in ("loss", "grad_norm", "noise_trace"):
                    assert other[key] == pytest.approx(one[key], rel=1e-4), f"{zero}, {optimizer}, {key}"
            evaluated = [events(tmp_path / f"{name}-{optimizer}", "eval")[-1] for name in ("torch", zero)]
            for key in ("loss", "average/loss"):
                assert evaluated[1][key] == pytest.approx(evaluated[0][key], rel=1e-5), f"{zero}, {optimizer}, {key}"
            assert evaluated[1]["average/loss"] != evaluated[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "optimizer"), [(2, "adamw"), (1, "muon"), (3, "muon")])
def test_a_killed_run_resumes_bit_identical(distgrow: Commands, zero: int, optimizer: str) -> None:
    often = (engine(zero), *OFTEN, f"optimizer={{kind: {optimizer}}}")
    assert distgrow.train("whole", *often, workers=2).code == 0
    words = ["train", str(ROOT / "configs/digits.yaml"), *TINY, "run.dir=killed", *often]
    process = distgrow.start(*words, module=torchrun(2))
    until_step(distgrow.folder / "killed", 25, process)
    kill_group(process)
    assert distgrow.train("killed", *often, workers=2, resume=True).code == 0
    assert (parameters(distgrow.folder / "whole") == parameters(distgrow.folder / "killed")).all()
    assert {**ledger(distgrow.folder / "killed"), "replayed": 0} == ledger(distgrow.folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_goes_on_with_another_number_of_ranks_by_the_universal_format(distgrow: Commands, zero: int) -> None:
    assert distgrow.train("whole", engine(zero), *OFTEN, workers=2).code == 0
    shutil.copytree(distgrow.folder / "whole", distgrow.folder / "moved")
    for newest in checkpoints(distgrow.folder / "moved")[3:]:
        shutil.rmtree(newest)
    assert distgrow.train("moved", engine(zero), *OFTEN, workers=1, resume=True).code == 0
    assert apart(parameters(distgrow.folder / "whole"), parameters(distgrow.folder / "moved")) <= 1e-5
    assert ledger(distgrow.folder / "moved")["applied"] == 1500
    assert events(distgrow.folder / "moved", "step")[-1]["world"] == 1
    assert not list((distgrow.folder / "moved/checkpoints").glob(".*"))


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_nan_on_one_rank_is_skipped_on_all_and_counted(distgrow: Commands, zero: int) -> None:
    (distgrow.folder / "faulty.py").write_text(FAULTY)
    assert distgrow.train("run", *task(poison=[7], rank=(1,)), engine(zero), workers=2).code == 0
    skips, counted = events(distgrow.folder / "run", "skip"), ledger(distgrow.folder / "run")
    assert counted["skipped"] == sum(skip["batch"] for skip in skips) > 0
    assert counted["applied"] == 1500
    assert parameters(distgrow.folder / "run").isfinite().all()


BRANCHED = """
import torch
from torch import nn

class Branched(nn.Module):
    def __init__(self, branches):
        super().__init__()
        self.a, self.b, self.out, self.never = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(4, 8)
        self.branches = branches

    def forward(self, rows):
        if not self.branches:
            return self.out(self.a(rows) + self.b(rows))
        first, hidden = rows[:, 0] > 0, torch.zeros(len(rows), 8)
        for layer, taken in ((self.a, first), (self.b, ~first)):
            if taken.any():
                hidden = hidden.index_put((taken,), layer(rows[taken]))
        return self.out(hidden)

def make(branches):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
    return Branched(branches), lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), data
"""


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("branches", [True, False])
def test_layers_that_only_some_rows_use_are_refused_and_one_that_none_uses_is_not(
    distgrow: Commands, zero: int, branches: bool
) -> None:
    (distgrow.folder / "branched.py").write_text(BRANCHED)
    target = f"task={{kind: target, target: 'branched:make', args: {{branches: {str(branches).lower()}}}}}"
    small = ("model=null", "growth={kind: constant, start: 2}", "stages={}", "budget={samples: 64}")
    finished = distgrow.train("run", target, *small, engine(zero), "launch.workers=2")
    assert finished.code == (2 if branches else 0)
    assert ("a.weight" in finished.err and "find_unused: true" in finished.err) == branches


GIVEN_BACK = """
import io
import torch
from torch import nn
from distgrow import RunSpec, budget, constant, fit
from distgrow.engine.spec import DeepSpeed

data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    run, engine = RunSpec(dir="run"), DeepSpeed(zero=3)
    fit(model, loss, data, growth=constant(8), budget=budget(epochs=1), run=run, engine=engine)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    rows = torch.randn(3, 4)
    assert torch.equal(again(rows), model(rows))
    again(rows).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
"""


def test_a_model_that_zero_3_gives_back_can_be_saved_whole_and_trained_on(distgrow: Commands) -> None:
    (distgrow.folder / "back.py").write_text(GIVEN_BACK)
    assert distgrow(module=("back",)).code == 0


SEVERAL = """
import torch
from torch import nn
from distgrow import RunSpec, Torch, budget, constant, fit
from distgrow.distributed.world import joined
from distgrow.engine.spec import DeepSpeed

torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def trained(name, engine, world):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    first, last = model[0].parameters(), model[2].parameters()
    both = [torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.AdamW(last, lr=0.05)]
    run, shape = RunSpec(dir=name), {"growth": constant(8), "budget": budget(epochs=2)}
    fit(model, loss, data, **shape, run=run, engine=engine, optimizer=both, world=world)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

if __name__ == "__main__":
    with joined("cpu", alone=True) as world:
        whole = trained("torch", Torch(), world)
        for zero, offload in ((1, False), (2, True), (3, False)):
            found = trained(f"zero-{zero}", DeepSpeed(zero=zero, offload_optimizer=offload), world)
            torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7)
"""


def test_several_own_optimizers_step_their_shards_together(distgrow: Commands) -> None:
    (distgrow.folder / "several.py").write_text(SEVERAL)
    assert distgrow(module=("several",)).code == 0


class Exploit:
    """What an attacker would put into a checkpoint."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_would_execute_code_is_refused(distgrow: Commands) -> None:
    assert distgrow.train("run", engine(1)).code == 0
    newest = checkpoints(distgrow.folder / "run")[-1]
    shards = newest / "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = torch.load(shards, weights_only=False)
    torch.save({**state, "extra": Exploit(distgrow.folder / "broken-into")}, shards, pickle_module=pickle)
    manifest = json.loads((newest / "manifest.json").read_text())
    digest = subprocess.run(["sha256sum", str(shards)], capture_output=True, text=True, check=True).stdout.split()[0]
    (newest / "manifest.json").write_text(json.dumps({**manifest, str(shards.relative_to(newest)): digest}))
    finished = distgrow.train("run", engine(1), resume=True)
    assert finished.code == 2, finished.err
    assert "is not a checkpoint that can be loaded without executing code" in finished.err
    assert "Traceback" not in finished.err
    assert not (distgrow.folder / "broken-into").exists()


def test_half_precision_parameters_train_and_are_kept_in_full(distgrow: Commands) -> None:
    halved = "engine={kind: deepspeed, zero: 2, precision: bfloat16}"
    assert distgrow.train("run", halved, "budget={samples: 6000}", "lr.base=0.2").code == 0
    assert events(distgrow.folder / "run", "eval")[-1]["accuracy"] > 0.9
    assert parameters(distgrow.folder / "run").dtype == torch.float32


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("engine.kind=deepspeed", "engine.zero=4"), "engine.zero=4: must be 1, 2 or 3"),
        (("engine={kind: deepspeed, offload_parameters: true}",), "offload_parameters needs zero=3"),
        (("engine={kind: deepspeed, fused: true}",), "engine.fused=true has no kernel for optimizer.kind=sgd"),
        (("engine={kind: deepspeed, precision: float64}",), "engine.precision='float64'"),
    ],
)
def test_bad_settings_end_with_a_message_and_code_2(distgrow: Commands, overrides: tuple[str, ...], told: str) -> None:
    finished = distgrow.train("run", *overrides)
    assert finished.code == 2, finished.err
    assert told in finished.err
    assert "Traceback" not in finished.err


def nowhere(model: nn.Module, batch: Any) -> torch.Tensor:
    raise AssertionError("no engine may be built")


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("spec", [spec for spec in union() if spec().sharded_fault() and not spec.joins_flat])
def test_an_optimizer_that_needs_whole_parameters_is_refused_by_name(
    spec: type[OptimizerSpec], zero: Literal[1, 2, 3]
) -> None:
    engine, refused = DeepSpeed(zero=zero), f"optimizer.kind={spec().name} .* engine.zero={zero} .* engine.kind=torch"
    with pytest.raises(ConfigError, match=refused):
        check_compatible(Constant(start=8), spec(), engine)
    with pytest.raises(ConfigError, match=refused):
        engine.build(nn.Linear(2, 2), nowhere, metrics=None, optimizer=spec(), world=World())
    check_compatible(Constant(start=8), spec(), Torch())


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_runs_in_one_process_come_one_after_another(tmp_path: Path, workers: int) -> None:
    in_ranks("one_after_another.py", str(tmp_path), workers=workers)
