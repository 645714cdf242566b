"""Process groups that DeepSpeed keeps for the whole process: those of a run before may be gone."""

from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups as kept

_KEPT: Any = kept


def forget_lost_groups() -> None:
    """Have DeepSpeed forget its groups if they were made before the ranks came together anew, as for a second run."""
    world = _KEPT._WORLD_GROUP
    if world is None:
        return
    try:
        dist.get_global_rank(world, 0)
    except ValueError:  # torch does not know it any more
        _KEPT._release_process_group_references()
