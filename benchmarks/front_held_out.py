"""Tasks that the default was not chosen on, as functions for `task.target`."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sfo_tasks import cross_entropy, scores
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.data.datasets import Arrays
from distgrow.tasks.task import Task

#: Packages of the standard library that a window of bytes is from one of.
PACKAGES = ("asyncio", "ctypes", "email", "encodings", "importlib", "multiprocessing", "unittest", "xml")
INPUTS, NOISE = 64, 0.5  #: the teacher's inputs, and the deviation of its noise over that of its outputs


def teacher(samples: int, held_out: int, width: int = 64) -> Task:
    """Return regression on a random net's outputs with noise; the variance of input i is 1/i."""
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples + held_out, INPUTS, generator=draws) / torch.arange(1, INPUTS + 1).sqrt()
    first, second = (torch.randn(*shape, generator=draws) for shape in ((INPUTS, 32), (32, 1)))
    outputs = (inputs @ first).tanh() @ second
    outputs /= outputs.std()
    targets = outputs + NOISE * torch.randn(outputs.shape, generator=draws)
    return Task(
        model=nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, 1)),
        loss=squared,
        train=Arrays(inputs[:samples], targets[:samples]),
        test=Arrays(inputs[samples:], targets[samples:]),
        metrics=squared_scores,
    )


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error over the rows."""
    return F.mse_loss(model(batch[0]), batch[1])


def squared_scores(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the mean squared error as what an evaluation records."""
    return {"loss": squared(model, batch)}


class Window(nn.Module):
    """Give the logits of a window's package, by a convolution over its bytes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.filters = nn.Conv1d(16, width, kernel_size=5)
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [rows, packages] of bytes [rows, length]."""
        return self.head(self.filters(self.embedding(inputs).transpose(1, 2)).relu().mean(2))


def packages(samples: int, held_out: int, length: int = 64) -> Task:
    """Return the question which package a window of bytes is from; held-out windows are from other files.

    Raises:
        ConfigError: The installed packages have fewer windows.
    """
    known, unseen = windows(length)
    if len(known[0]) < samples or len(unseen[0]) < held_out:
        raise ConfigError(
            f"the standard library has {len(known[0]):,} windows to train on and {len(unseen[0]):,} to hold out, "
            f"{samples:,} and {held_out:,} are needed; lower --budget"
        )
    train, test = (Arrays(part[0][:size], part[1][:size]) for part, size in ((known, samples), (unseen, held_out)))
    return Task(model=Window(), loss=cross_entropy, train=train, test=test, metrics=scores)


def windows(length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the shuffled windows and their packages' numbers, of files to train on and of files to hold out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, package in enumerate(PACKAGES):
        for file in sorted((root / package).rglob("*.py")):
            digest = hashlib.sha256(str(file.relative_to(root)).encode()).digest()
            text = np.frombuffer(file.read_bytes(), np.uint8)
            rows = torch.from_numpy(text[: len(text) // length * length].reshape(-1, length).astype(np.int64))
            held = digest[0] < 32  # an eighth of the files
            parts[held].append(rows)
            labels[held].append(torch.full((len(rows),), number))
    return shuffled(parts[0], labels[0]), shuffled(parts[1], labels[1])


def shuffled(rows: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows and labels in one random order."""
    inputs, numbers = torch.cat(rows), torch.cat(labels)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return inputs[order], numbers[order]
