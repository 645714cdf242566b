"""The backward pass of a loss, without what torch looks at on the way to it; knows no engine."""

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import has_torch_function_unary


def backward(loss: Tensor) -> None:
    """Add the gradient of a loss to its leaves, as `loss.backward()` does for one real number.

    Torch looks at the shapes and kinds of outputs, gradients and inputs before it starts the same pass, which takes
    longer than a small layer. Other kinds of tensors, and what follows calls of torch's functions, get all of that.
    """
    if has_torch_function_unary(loss) or loss.is_complex():
        loss.backward()
        return
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
