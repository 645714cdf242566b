"""What a DeepSpeed checkpoint's folder may hold: shards that the manifest lists, and in them nothing but data."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from distgrow.core.errors import RunError
from distgrow.engine.deepspeed.shard_files import check

MODEL, OPTIM = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Payload:
    """What an attacker would put into a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000001"
    (folder / "deepspeed").mkdir(parents=True)
    for name in (MODEL, OPTIM):
        torch.save({"weights": torch.ones(3)}, folder / "deepspeed" / name)
    (folder / "manifest.json").write_text(json.dumps({f"deepspeed/{name}": "digest" for name in (MODEL, OPTIM)}))
    return folder


def test_shards_that_the_manifest_lists_are_counted(checkpoint: Path) -> None:
    assert check(checkpoint) == 1


@pytest.mark.parametrize("place", [f"deepspeed/more/{MODEL}", "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt",
                                   "deepspeed/layer_00-model_states.pt", "deepspeed/notes.txt"])  # fmt: skip
@pytest.mark.parametrize("harmless", [True, False])
def test_a_file_that_no_manifest_lists_is_refused_unread(checkpoint: Path, place: str, harmless: bool) -> None:
    file = checkpoint / place
    file.parent.mkdir(exist_ok=True)
    torch.save({} if harmless else Payload(checkpoint / "broken-into"), file, pickle_module=pickle)
    with pytest.raises(RunError, match="is no part of the checkpoint"):
        check(checkpoint)
    assert not (checkpoint / "broken-into").exists()


def test_a_link_among_the_shards_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "deepspeed" / MODEL).rename(tmp_path / MODEL)
    (checkpoint / "deepspeed" / MODEL).symlink_to(tmp_path / MODEL)
    with pytest.raises(RunError, match="is no part of the checkpoint"):
        check(checkpoint)


def test_a_listed_shard_that_would_execute_code_is_refused(checkpoint: Path) -> None:
    torch.save(Payload(checkpoint / "broken-into"), checkpoint / "deepspeed" / OPTIM, pickle_module=pickle)
    with pytest.raises(RunError, match="without executing code"):
        check(checkpoint)
    assert not (checkpoint / "broken-into").exists()
