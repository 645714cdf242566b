"""The config that DeepSpeed is given; importing this loads no torch."""

from typing import Any

from distgrow.distributed.world import World
from distgrow.engine.spec import DeepSpeed
from distgrow.optim import OptimizerSpec


def settings(spec: DeepSpeed, optimizer: OptimizerSpec, world: World) -> dict[str, Any]:
    """DeepSpeed's config. Its own batch sizes are placeholders: accumulation and weighting are the caller's."""
    zero: dict[str, Any] = {"stage": spec.zero, "reduce_bucket_size": int(spec.bucket_mb * 2**20 / 4)}
    if spec.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if spec.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    precision: dict[str, Any] = {}
    if spec.precision == "bfloat16":
        precision["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if spec.precision == "float16":
        power, window = spec.loss_scale_power, spec.loss_scale_window
        precision["fp16"] = {
            "enabled": True,
            "initial_scale_power": power,
            "loss_scale_window": window,
            "hysteresis": 1,
        }
    if precision:
        precision["data_types"] = {"grad_accum_dtype": "fp32"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.clip or 0.0,  # unsaid, it would be 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        **precision,
    }
