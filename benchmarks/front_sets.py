"""What the benchmark of fronts trains, as functions for `task.target`: noisy digits, and a text of source files."""

import hashlib
import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sfo_tasks import cross_entropy, mislabelled, noisy_digits, scores
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, UInt64s
from distgrow.data import datasets
from distgrow.data.dataset import Batched
from distgrow.tasks.architectures import GPT, MLP, Images, Tokens
from distgrow.tasks.task import Task

PENALTY = 1e-3  #: weight decay of softmax regression, a part of its objective


# ── digits ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Both(Batched):
    """Training samples and held-out ones, each with a 1 if it is of the training set, else a 0."""

    def __init__(self, *parts: Any) -> None:
        self.inputs, self.labels, self.right = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "labels", "right")
        )
        self.trained = torch.arange(len(self.inputs)) < len(parts[0])

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.inputs[index], self.labels[index], self.right[index], self.trained[index]

    def batch(self, indices: Int64s, seeds: UInt64s) -> tuple[Tensor, ...]:
        """Return the collated rows `indices`."""
        rows = torch.from_numpy(indices)
        return self.inputs[rows], self.labels[rows], self.right[rows], self.trained[rows]


def digits_objective() -> Task:
    """Softmax regression on noisy digits; `loss` is the objective, over the whole training set with its penalty."""
    task = noisy_digits()
    both = Both(task.train, task.test)
    share = len(task.train) / len(both)

    def metrics(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        inputs, labels, right, trained = batch
        logits = model(inputs)
        losses = F.cross_entropy(logits, labels, reduction="none")
        penalty = PENALTY / 2 * sum((p.square().sum() for p in model.parameters()), start=torch.zeros(()))
        correct = (logits.argmax(-1) == right).float()
        return {
            "loss": (losses * trained).mean() / share + penalty,
            "held_loss": (losses * ~trained).mean() / (1 - share),
            "accuracy": (correct * ~trained).mean() / (1 - share),
        }

    return replace(task, test=both, metrics=metrics)


@cache
def digits_minimum() -> float:
    """Return the least value of the objective of `digits_objective`, by L-BFGS in float64."""
    task = digits_objective()
    rows = torch.arange(len(task.train)).numpy()
    inputs, labels, _ = task.train.batch(rows, rows.astype(np.uint64))
    model = task.model.double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = PENALTY / 2 * sum((p.square().sum() for p in model.parameters()), start=torch.zeros(()))
        loss = F.cross_entropy(model(inputs.double()), labels) + penalty
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return closure().item()


def digits_mlp(width: int = 64) -> Task:
    """Return an MLP on the noisy digits; held-out labels are as noisy."""
    train, test = (mislabelled(part, 0.2, seed) for seed, part in enumerate(datasets.digits()))
    shape = Images(channels=1, height=8, width=8, classes=10)
    model = MLP.model_validate({"kind": "mlp", "hidden": [width]}).build(shape)
    return Task(model=model, loss=cross_entropy, train=train, test=test, metrics=scores)


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sources_text(samples: int, held_out: int, length: int, layers: int, width: int, heads: int) -> Task:
    """Return a byte GPT on the sources of the standard library and of what is installed beside it."""
    train, test = (samples * length + 1, held_out * length + 1)
    stream = sources(train + test)
    return Task(
        model=GPT(layers=layers, width=width, heads=heads).build(Tokens(length=length, vocabulary=256)),
        loss=cross_entropy,
        train=datasets.Tokens(stream[:train], length),
        test=datasets.Tokens(stream[-test:], length),
        metrics=scores,
    )


@cache
def sources(size: int) -> Int64s:
    """Return `size` bytes of source files, which come in an order that their names' hashes give.

    Raises:
        ConfigError: There are not so many.
    """
    text = bytearray()
    for file in source_files():
        text += file.read_bytes() + b"\n"
        if len(text) >= size:
            return np.frombuffer(bytes(text[:size]), np.uint8).astype(np.int64)
    raise ConfigError(f"{len(text):,} bytes of sources are installed, {size:,} are needed; lower --budget")


@cache
def source_files() -> list[Path]:
    """Return the Python files of the standard library and of site-packages, each folder's in one shuffled order."""
    named: dict[str, Path] = {}
    for key in ("stdlib", "purelib", "platlib"):
        folder = Path(sysconfig.get_paths()[key])
        named |= {str(file.relative_to(folder)): file for file in folder.rglob("*.py") if file.is_file()}
    return [named[name] for name in sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest())]
