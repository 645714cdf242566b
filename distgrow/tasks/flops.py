"""FLOPs of training a language model on a token; knows no GPU."""

from torch import nn

from distgrow.tasks.architectures import GPT, Model


def flops_of_gpt(model: Model, module: nn.Module, length: int) -> float | None:
    """Return the FLOPs for each token of a built model; None if it is no GPT, or one with experts."""
    if not isinstance(model, GPT) or model.experts is not None:
        return None
    return flops_per_token(module, layers=model.layers, width=model.width, length=length)


def flops_per_token(model: nn.Module, *, layers: int, width: int, length: int) -> float:
    """Return the FLOPs of a training step for each token: 6·N + 12·layers·width·length.

    N counts the parameters that take part in a product for every token: all but tables that are only looked up, the
    embeddings of places and, unless it is the output layer, too, that of tokens. The second term is that of attention
    over the whole length. After Chowdhery et al. 2022 (PaLM), appendix B, arXiv 2204.02311.
    """
    parts = [part for part in model.modules() if not isinstance(part, nn.Embedding)]
    used = {id(p): p.numel() for part in parts for p in part.parameters(False)}
    return 6.0 * sum(used.values()) + 12.0 * layers * width * length
