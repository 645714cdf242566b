"""The backward pass of a loss, without what torch looks at on the way to it; knows no engine."""

import torch
from torch import Tensor
from torch.autograd import graph
from torch.overrides import has_torch_function_unary

#: The backward pass itself, None if this torch has no such function.
_run = getattr(graph, "_engine_run_backward", None)
_TORCHS = (Tensor.backward, torch.autograd.backward)


def backward(loss: Tensor) -> None:
    """Add the gradient of a loss to its leaves, as `loss.backward()` does for one real number.

    Torch looks at the shapes and kinds of outputs, gradients and inputs before it starts the same pass, which takes
    longer than a small layer. Other kinds of tensors, and what follows calls of torch's functions, get all of that. So
    does a backward that somebody has put in the place of torch's.
    """
    replaced = (Tensor.backward, torch.autograd.backward) != _TORCHS
    if _run is None or replaced or loss.dim() or has_torch_function_unary(loss) or loss.is_complex():
        loss.backward()
        return
    _run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
