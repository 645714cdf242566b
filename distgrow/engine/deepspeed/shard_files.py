"""Files of a DeepSpeed checkpoint: which a folder may hold, and how one is read. Needs no deepspeed."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distgrow.core.errors import RunError

TAG = "deepspeed"
_MANIFEST = "manifest.json"
#: Names of shards in a checkpoint's folder.
_SHARD = re.compile(rf"{TAG}/((bf16_)?zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt")
#: What DeepSpeed's files hold beside tensors and plain values: records without behaviour.
RECORDS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class _Empty:
    """Stand for a record, for readers that need none of them."""

    def __init__(self, *values: Any) -> None:
        del values


#: A class of its own for each record.
_EMPTY = [(type("Empty", (_Empty,), {}), name) for name in RECORDS]


def check(folder: Path) -> int:
    """Check the shards of a checkpoint, and return the number of ranks that wrote them.

    DeepSpeed's conversion unpickles every file in the folder, and a pickle can execute code. So the folder may hold
    nothing but shards that the checkpoint's manifest lists. Each is first read by torch's restricted unpickler, which
    builds nothing but tensors, plain values and RECORDS. The tensors stay on the disk.

    Raises:
        RunError: There is something else, or a shard holds more than data.
    """
    shards = folder / TAG
    names = listed(folder)
    for file in sorted(shards.rglob("*")):
        name = file.relative_to(folder).as_posix()
        known = _SHARD.fullmatch(name) and file.is_file() and not file.is_symlink()
        if not known or (names is not None and name not in names):
            raise RunError(
                f"{file} is no part of the checkpoint, and reading it could execute code; remove it, and find out who "
                "has put it there"
            )
        restricted(file, mmap=True)
    return len(list(shards.glob("*optim_states.pt")))


def listed(folder: Path) -> set[str] | None:
    """Return the names of the files that a checkpoint's manifest lists. None: it has no manifest."""
    manifest = folder / _MANIFEST
    return set(json.loads(manifest.read_text(encoding="utf-8"))) if manifest.exists() else None


def restricted(file: Path, records: Sequence[Any] = _EMPTY, **options: Any) -> Any:
    """Read a file by torch's restricted unpickler, onto the CPU by default.

    Args:
        file: The file.
        records: Classes that it may hold, or pairs of a class and the name that stands for it in the file.
        **options: Options of torch.load.

    Raises:
        RunError: It cannot be read without executing code.
    """
    try:
        with torch.serialization.safe_globals(list(records)):
            return torch.load(file, weights_only=True, **{"map_location": "cpu", **options})
    except Exception as error:  # whatever the unpickler meets in a file that is none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise RunError(f"{file} is not a checkpoint that can be loaded without executing code: {reason}") from None
