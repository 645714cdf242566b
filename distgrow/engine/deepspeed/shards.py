"""DeepSpeed's checkpoints: its native shards, and its universal format where the number of ranks has changed."""

import contextlib
import io
import secrets
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from filelock import FileLock

from distgrow.core.errors import RunError
from distgrow.distributed.world import World
from distgrow.engine.deepspeed.shard_files import TAG, check, restricted
from distgrow.engine.state import serialised
from distgrow.run.folder import storing

#: The classes that RECORDS names.
_RECORDS = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class Shards:
    """Read and write the files of a DeepSpeed engine's state; every rank has its own."""

    def __init__(self, engine: Any, world: World, *, resizes: bool) -> None:
        """Take over the engine's files; `resizes` tells whether another number of ranks can go on with them."""
        self._engine, self._world, self._resizes = engine, world, resizes
        self._files = engine.checkpoint_engine = _Files()

    def snapshot(self) -> dict[str, bytes]:
        """Return the native shards of this rank, by their names. Collective: every rank must call."""
        with tempfile.TemporaryDirectory() as folder:  # for a script of its own that DeepSpeed leaves there
            self._engine.save_checkpoint(folder, tag=TAG, save_latest=False)
            return self._files.taken(Path(folder))

    def load(self, folder: Path) -> None:
        """Read the shards of all ranks, on any number of ranks; executes no code from the files. Collective.

        Raises:
            RunError: The folder holds more than data of shards, or another number of ranks cannot go on with it.
        """
        ranks = self._world.on_rank0(lambda: check(folder))
        if ranks == self._world.size:
            self._engine.load_checkpoint(str(folder), tag=TAG)
            return
        if not self._resizes:
            raise RunError(
                f"{folder} was written by {ranks} ranks; DeepSpeed's universal format, which another number of ranks "
                f"needs, knows Adam's state alone: go on with {ranks}, or use optimizer.kind=adamw or "
                "engine.kind=fsdp from the start"
            )
        # nobody can have put anything into a folder of a name that is drawn here
        name = self._world.on_rank0(lambda: f".partial-universal-{folder.name}-{secrets.token_hex(16)}")
        universal = folder.with_name(name)
        self._world.on_all_ranks(lambda: convert_once(folder / TAG, universal / TAG))
        self._engine._config.load_universal_checkpoint = True  # DeepSpeed asks its config, which knew no checkpoint
        self._engine.load_checkpoint(str(universal), tag=TAG)
        self._engine._config.load_universal_checkpoint = False
        self._world.sum([0.0])  # every rank has read it
        shutil.rmtree(universal, ignore_errors=True)  # each host has its own, or all have one
        _lock(universal).unlink(missing_ok=True)


class _Files(TorchCheckpointEngine):
    """Keep what DeepSpeed would write, and read what it loads by torch's restricted unpickler."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, bytes] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Keep one file."""
        self._kept[path] = serialised(_without_enums(state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; executes no code from it."""
        return restricted(Path(path), _RECORDS, map_location=map_location)

    def taken(self, folder: Path) -> dict[str, bytes]:
        """Return what was kept, by names relative to `folder`, and forget it."""
        kept, self._kept = self._kept, {}
        return {str(Path(path).relative_to(folder)): data for path, data in kept.items()}


def _without_enums(state: Any) -> Any:
    """Replace DeepSpeed's enums, which Python 3.11.0 to 3.11.3 pickle as calls of getattr, by plain numbers."""
    if isinstance(state, ZeroStageEnum):
        return int(state)
    if type(state) is dict:
        return {key: _without_enums(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_without_enums(value) for value in state)
    return state


def convert_once(native: Path, universal: Path) -> None:
    """Convert, unless another rank that sees the same folder has done so."""
    with FileLock(_lock(universal.parent)):
        if not universal.exists():
            convert(native, universal)


def _lock(universal: Path) -> Path:
    return universal.with_suffix(".lock")


def convert(native: Path, universal: Path) -> None:
    """Convert native shards to DeepSpeed's universal format, in a new folder."""
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    paths = {"input_folder": str(native), "output_folder": str(universal)}
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with storing(universal.parent), quiet[0], quiet[1]:
        universal.mkdir(parents=True)
        ds_to_universal.main(Namespace(**options, **paths, inject_missing_state=True))
