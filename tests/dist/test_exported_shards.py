"""The model out of shards: weights of every stage of ZeRO against the live modules', without deepspeed."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Commands, in_ranks
from safetensors.torch import load_file
from torch import Tensor, nn

from distgrow import load_weights
from distgrow.checkpoint.export import export, weights_of
from distgrow.core.errors import ConfigError

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra 'deepspeed'")

FAST, MORE = ("1-float32", "3-bfloat16"), ("1-bfloat16", "2-float32", "2-bfloat16", "3-float32")
Found = tuple[Path, dict[str, dict[str, dict[str, Tensor]]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return trained(tmp_path_factory.mktemp("shards"), *FAST)


def trained(folder: Path, *engines: str) -> Found:
    in_ranks("exported.py", str(folder), *engines, workers=2)
    return folder, torch.load(folder / "found.pt", weights_only=True)


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def check_equal(run: Path, found: dict[str, dict[str, Tensor]], out: Path) -> None:
    """Check the present weights, their ties, and their average."""
    file, weights = export(run, out)
    assert same(load_file(file), found["live"])
    assert weights.state["last.weight"].data_ptr() == weights.state["model.weight"].data_ptr()
    exported = weights_of(run, average=True).state
    assert same(exported, found["average"])
    assert not torch.equal(exported["last.weight"], found["live"]["last.weight"])


@pytest.mark.parametrize("engine", FAST)
def test_exported_weights_and_averages_are_the_live_modules_bit_for_bit(
    runs: Found, engine: str, tmp_path: Path
) -> None:
    check_equal(runs[0] / engine, runs[1][engine], tmp_path)


@pytest.mark.slow
def test_it_is_so_for_every_stage_in_float32_and_bfloat16(tmp_path: Path) -> None:
    folder, found = trained(tmp_path, *MORE)
    for engine in MORE:
        check_equal(folder / engine, found[engine], tmp_path / f"{engine}-out")


class Tied(nn.Module):
    """The names and shapes of the model of exported.py, with other values."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.last, self.frozen = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 7)
        self.norm, self.scale = nn.BatchNorm1d(5), nn.Parameter(torch.zeros(1))
        self.register_buffer("range", torch.zeros(5))
        self.last.weight = self.model.weight


def test_a_model_on_a_machine_without_deepspeed_takes_the_weights(runs: Found, distgrow: Commands) -> None:
    (distgrow.folder / "deepspeed.py").write_text("raise ImportError('not here')")
    answer = distgrow("export", str(runs[0] / "3-bfloat16"), "out.safetensors")
    assert answer.code == 0, answer.err
    assert same(load_file(distgrow.folder / "out.safetensors"), runs[1]["3-bfloat16"]["live"])
    model = Tied()
    load_weights(model, runs[0] / "1-float32")
    assert same(model.state_dict(), runs[1]["1-float32"]["live"])
    assert model.last.weight is model.model.weight
    model.more = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="the run lacks more.weight, more.bias; give the run's own model"):
        load_weights(model, runs[0] / "1-float32")


class Payload:
    """What an attacker would put into a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


SHARD = "deepspeed/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def damage(newest: Path, what: str) -> None:
    """Do something to a checkpoint. What is "listed" has its right digest in the manifest."""
    manifest = json.loads((newest / "manifest.json").read_text())
    if what == "truncated":
        (newest / SHARD).write_bytes((newest / SHARD).read_bytes()[:-1])
    elif what == "missing":
        (newest / SHARD).unlink()
    elif what == "beside":
        torch.save(Payload(newest / "broken-into"), newest / "deepspeed/mp_rank_00_model_states.pt")
    elif what == "listed code":
        torch.save(Payload(newest / "broken-into"), newest / SHARD, pickle_module=pickle)
    elif what == "listed others":
        torch.save({"optimizer_state_dict": {"fp32_flat_groups": [torch.ones(2)] * 2}}, newest / SHARD)
    elif what == "unlisted rank":
        (newest / SHARD).unlink()
        del manifest[SHARD]
    if SHARD in manifest and what.startswith("listed"):
        manifest[SHARD] = hashlib.sha256((newest / SHARD).read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("truncated", "optim_states.pt does not match its digest; the newest intact one is step=2"),
        ("missing", "optim_states.pt is missing; the newest intact one is step=2"),
        ("beside", "model_states.pt is no part of the checkpoint"),
        ("listed code", "without executing code"),
        ("listed others", "the shards do not fit together"),
        ("unlisted rank", "holds the shards of 1 ranks, but 2 wrote it"),
    ],
)
def test_a_damaged_checkpoint_writes_nothing(runs: Found, what: str, said: str, tmp_path: Path) -> None:
    shutil.copytree(runs[0] / "3-bfloat16", tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step-00000004"
    damage(newest, what)
    with pytest.raises(ConfigError, match=said):
        export(tmp_path / "run", tmp_path / "out.safetensors", step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (newest / "broken-into").exists()


def test_a_file_that_no_manifest_lists_is_not_taken_for_the_weights(runs: Found, tmp_path: Path) -> None:
    shutil.copytree(runs[0] / "3-bfloat16", tmp_path / "run")
    torch.save({"model": {}}, tmp_path / "run/checkpoints/step-00000004/engine.pt")
    assert same(weights_of(tmp_path / "run").state, runs[1]["3-bfloat16"]["live"])
