"""MFU: the share of the peak FLOP/s of all GPUs that a model's FLOPs take."""

import torch

from distgrow.core.peak_flops import peak_flops
from distgrow.distributed.world import World
from distgrow.engine.spec import EngineSpec
from distgrow.tasks.task import Task


def mfu_of_token(task: Task, engine: EngineSpec, peak: float | None, world: World) -> float | None:
    """Return what one token a second is of the peak of all ranks; None if that is not known.

    Args:
        task: It says what FLOPs a token takes, if it knows.
        engine: Its precision decides on the peak. What its own actors compute is not known.
        peak: FLOP/s of one rank's device, `run.peak_flops`. None: those of a known GPU.
        world: The ranks; all are taken to have this one's device.
    """
    if task.flops_per_token is None or engine.actors:
        return None
    if peak is None and world.device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        peak = peak_flops(torch.cuda.get_device_name(world.device), engine.precision, tf32=tf32)
    return None if peak is None else task.flops_per_token / (peak * world.size)
