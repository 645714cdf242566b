"""DeepSpeed's checkpoints: its native shards, and its universal format where the number of ranks has changed."""

import contextlib
import io
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from filelock import FileLock

from distgrow.core.errors import RunError
from distgrow.distributed.world import World
from distgrow.engine.state import serialised
from distgrow.run.folder import storing

_TAG = "deepspeed"
#: What DeepSpeed's files hold beside tensors and plain values: records without behaviour.
_RECORDS = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class Shards:
    """The files of a DeepSpeed engine's state; every rank reads and writes its own."""

    def __init__(self, engine: Any, world: World, *, resizes: bool) -> None:
        """Take over the engine's files; `resizes` tells whether another number of ranks can go on with them."""
        self._engine, self._world, self._resizes = engine, world, resizes
        self._files = engine.checkpoint_engine = _Files()

    def snapshot(self) -> dict[str, bytes]:
        """The native shards of this rank, by their names. Collective: every rank must call."""
        with tempfile.TemporaryDirectory() as folder:  # for a script of its own that DeepSpeed leaves there
            self._engine.save_checkpoint(folder, tag=_TAG, save_latest=False)
            return self._files.taken(Path(folder))

    def load(self, folder: Path) -> None:
        """Read the shards of all ranks, on any number of ranks; executes no code from the files. Collective."""
        ranks = self._world.on_rank0(lambda: check(folder / _TAG))
        if ranks == self._world.size:
            self._engine.load_checkpoint(str(folder), tag=_TAG)
            return
        if not self._resizes:
            raise RunError(
                f"{folder} was written by {ranks} ranks; DeepSpeed's universal format, which another number of ranks "
                f"needs, knows Adam's state alone: go on with {ranks}, or use optimizer.kind=adamw from the start"
            )
        universal = folder.with_name(f".partial-universal-{folder.name}")
        self._world.on_all_ranks(lambda: convert_once(folder / _TAG, universal / _TAG))
        self._engine._config.load_universal_checkpoint = True  # DeepSpeed asks its config, which knew no checkpoint
        self._engine.load_checkpoint(str(universal), tag=_TAG)
        self._engine._config.load_universal_checkpoint = False
        self._world.sum([0.0])  # every rank has read it
        shutil.rmtree(universal, ignore_errors=True)  # each host has its own, or all have one
        _lock(universal).unlink(missing_ok=True)


class _Files(TorchCheckpointEngine):
    """Keeps what DeepSpeed would write."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, bytes] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Keep one file."""
        self._kept[path] = serialised(_without_enums(state_dict))

    def taken(self, folder: Path) -> dict[str, bytes]:
        """What was kept, by names relative to `folder`."""
        kept, self._kept = self._kept, {}
        return {str(Path(path).relative_to(folder)): data for path, data in kept.items()}


def _without_enums(state: Any) -> Any:
    """The state with plain numbers for DeepSpeed's enums, which Python 3.11.0 to 3.11.3 pickle as calls of getattr."""
    if isinstance(state, ZeroStageEnum):
        return int(state)
    if type(state) is dict:
        return {key: _without_enums(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_without_enums(value) for value in state)
    return state


def check(folder: Path) -> int:
    """The number of ranks that wrote the shards in a folder; RunError where one holds more than data.

    DeepSpeed loads by unpickling, which can execute what a file says. So every file is first read by torch's
    restricted unpickler (its tensors stay on the disk), which builds nothing but tensors, plain values and _RECORDS.
    """
    with torch.serialization.safe_globals(_RECORDS):
        for file in sorted(folder.glob("*.pt")):
            try:
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                reason = str(error).strip().splitlines()[-1]
                raise RunError(
                    f"{file} is not a checkpoint that can be loaded without executing code: {reason}"
                ) from None
    return len(list(folder.glob("*optim_states.pt")))


def convert_once(native: Path, universal: Path) -> None:
    """Convert, unless another rank that sees the same folder has."""
    with FileLock(_lock(universal.parent)):
        if not universal.exists():
            convert(native, universal)


def _lock(universal: Path) -> Path:
    return universal.with_suffix(".lock")


def convert(native: Path, universal: Path) -> None:
    """DeepSpeed's own conversion of native shards to its universal format, in a new folder."""
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    paths = {"input_folder": str(native), "output_folder": str(universal)}
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with storing(universal.parent), quiet[0], quiet[1]:
        shutil.rmtree(universal.parent, ignore_errors=True)
        universal.mkdir(parents=True)
        ds_to_universal.main(Namespace(**options, **paths, inject_missing_state=True))
