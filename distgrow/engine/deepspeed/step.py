"""DeepSpeed's step on a gradient that is still to be divided; knows no engine of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


@contextmanager
def divided(optimizer: Any, divisor: float) -> Iterator[None]:
    """Make the step divide the reduced gradient by `divisor` before it is clipped, as ZeRO does by its loss scale."""
    if divisor == 1.0:
        yield
    elif isinstance(optimizer, BF16_Optimizer):  # it has no loss scale
        for gradient in optimizer.fp32_groups_gradients_flat:
            gradient.div_(divisor)
        yield
    else:
        optimizer.custom_loss_scaler, optimizer.external_loss_scale = True, optimizer.loss_scale * divisor
        try:
            yield
        finally:
            optimizer.custom_loss_scaler, optimizer.external_loss_scale = False, None
