"""language_task(): next-token prediction by a model on packed windows: loss, metrics and samples of text."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow.data.tokenizer import Tokenizer
from distgrow.tasks.experts import with_balance
from distgrow.tasks.task import Task
from distgrow.tasks.token_data import TokenData

#: Maps a model and tokens (rows, length) to logits (rows, length, vocabulary).
Logits = Callable[[nn.Module, Tensor], Tensor]


def language_task(data: TokenData, model: nn.Module, logits: Logits, flops: float | None = None) -> Task:
    """Return the task of a model that predicts next tokens.

    Args:
        data: The windows.
        model: The model.
        logits: How it maps tokens to logits.
        flops: FLOPs of training on a token, if they are known.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(logits(model, batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def metrics(model: nn.Module, batch: Any) -> dict[str, Any]:
        found, labels = logits(model, batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
        counted = labels >= 0
        total = F.cross_entropy(found, labels, reduction="sum")
        right = ((found.argmax(-1) == labels) & counted).sum()
        bits = {"bits_per_byte": (total * per_byte / math.log(2), counted.sum())} if per_byte else {}
        return {"loss": (total, counted.sum()), "accuracy": (right, counted.sum()), **bits}

    def items_of_rows(batch: Any) -> Tensor:
        return (batch["labels"] >= 0).sum(1)

    def items(batch: Any) -> Tensor:
        return (batch["labels"] >= 0).sum()

    some, of_rows = (None, None) if data.across else (items, items_of_rows)
    test, per_byte = data.testing()
    tokenizer = data.tokenizes()
    return Task(
        model=model,
        loss=with_balance(model, loss, of_rows),
        train=data.training(),
        test=test,
        metrics=metrics,
        items=some,
        tokens=data.length,
        flops_per_token=flops,
        sample=None if data.sample is None or tokenizer is None else sampler(data, tokenizer, logits, data.sample),
    )


def sampler(data: TokenData, tokenizer: Tokenizer, logits: Logits, count: int) -> Callable[[nn.Module], str]:
    """Return what lets a model write `count` tokens after the prompt, each drawn by its probability."""
    prompt = tokenizer.encode([(data.prompt or "\n").encode()])[0].tolist()
    known = tokenizer.size if data.end is None else max(tokenizer.size, data.end + 1)

    def sample(model: nn.Module) -> str:
        device, text = next(model.parameters()).device, list(prompt) or [data.end or 0]
        for _ in range(count):
            seen = text[-data.length :]
            window = torch.zeros(1, data.length, dtype=torch.long, device=device)
            window[0, : len(seen)] = torch.tensor(seen, device=device)  # of one shape, for models that are compiled
            weights = logits(model, window)[0, len(seen) - 1, :known].float().softmax(-1)
            text.append(int(torch.multinomial(weights.cpu(), 1)))
        return tokenizer.decode(text)

    return sample
