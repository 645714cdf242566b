"""The tasks of the SFO benchmark that are trained for real, as functions for `task.target`; knows no policy."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s, UInt64s
from distgrow.data import datasets, files
from distgrow.data.dataset import Batched
from distgrow.tasks import models
from distgrow.tasks.architectures import GPT, Images, ResNet, Tokens
from distgrow.tasks.task import Task


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean over the rows, and over their tokens."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def scores(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return the loss and the accuracy, by the batch's third column if there is one."""
    logits = model(batch[0]).flatten(0, -2)
    right = logits.argmax(-1) == batch[-1].flatten()
    return {"loss": F.cross_entropy(logits, batch[1].flatten()), "accuracy": right.float().mean()}


# ── softmax regression on noisy digits ──────────────────────────────────────────────────────────────────────────


class Mislabelled(Batched):
    """Inputs, labels of which some are wrong, and the right ones."""

    def __init__(self, clean: datasets.Arrays, labels: Tensor) -> None:
        self.inputs, self.labels, self.right = clean.inputs, labels, clean.labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs[index], self.labels[index], self.right[index]

    def batch(self, indices: Int64s, seeds: UInt64s) -> tuple[Tensor, Tensor, Tensor]:
        """Return the collated rows `indices`."""
        rows = torch.from_numpy(indices)
        return self.inputs[rows], self.labels[rows], self.right[rows]


def mislabelled(clean: datasets.Arrays, share: float, seed: int) -> Mislabelled:
    """Replace a share of the labels by another class, drawn uniformly."""
    random = np.random.default_rng(seed)
    labels = clean.labels.numpy().copy()
    wrong = random.permutation(len(labels))[: round(share * len(labels))]
    labels[wrong] = (labels[wrong] + random.integers(1, 10, len(wrong))) % 10
    return Mislabelled(clean, torch.from_numpy(labels))


def noisy_digits(noise: float = 0.2, all: bool = False) -> Task:
    """Softmax regression on scikit-learn's digits; held-out labels are as noisy, accuracy is by the right ones.

    `all`: train on all 1,797 images and hold none out.
    """
    train, test = datasets.digits()
    if all:
        train = datasets.Arrays(torch.cat([train.inputs, test.inputs]), torch.cat([train.labels, test.labels]))
    return Task(
        model=models.softmax_regression(64, 10),
        loss=cross_entropy,
        train=mislabelled(train, noise, seed=0),
        test=mislabelled(test, noise, seed=1),
        metrics=scores,
    )


# ── ResNets on CIFAR ────────────────────────────────────────────────────────────────────────────────────────────


def cifar(
    path: str, subset: int | None, held_out: int | None, classes: int = 10, kind: str = "resnet8", norm: str = "group"
) -> Task:
    """A ResNet on CIFAR-10 or CIFAR-100 from Parquet files, shifted and mirrored; the first rows of both parts."""
    label = "fine_label" if classes == 100 else "label"
    train, test = (_images(path, part, rows, label) for part, rows in (("train", subset), ("test", held_out)))
    shape = Images(channels=3, height=train[0].shape[2], width=train[0].shape[3], classes=classes)
    images = datasets.Images(*train, augment=True)
    return Task(
        model=ResNet.model_validate({"kind": kind, "norm": norm}).build(shape),
        loss=cross_entropy,
        train=images,
        probe=images.plain(),
        test=datasets.Images(*test, augment=False),
        metrics=scores,
    )


@cache
def _images(path: str, part: str, limit: int | None, label: str) -> tuple[files.Bytes, Int64s]:
    """Read the files once per process."""
    return files.parquet_images(files.parquet_files(Path(path), part), limit=limit, label=label)


# ── a small GPT ─────────────────────────────────────────────────────────────────────────────────────────────────


def text(path: str | None, samples: int, held_out: int, length: int, layers: int, width: int, heads: int) -> Task:
    """A GPT on the bytes of a text, by default Python's standard library; its last windows are held out."""
    stream, vocabulary = _tokens(path)
    needed = (samples + held_out) * length + 2
    if len(stream) < needed:
        raise ConfigError(f"path={path}: {len(stream)} bytes of text, {needed} are needed; use more text or a subset")
    cut = samples * length + 1
    shape = Tokens(length=length, vocabulary=vocabulary)
    return Task(
        model=GPT(layers=layers, width=width, heads=heads).build(shape),
        loss=cross_entropy,
        train=datasets.Tokens(stream[:cut], length),
        test=datasets.Tokens(stream[-(held_out * length + 1) :], length),
        metrics=scores,
    )


@cache
def _tokens(path: str | None) -> tuple[Int64s, int]:
    return files.tokens(files.read_text(Path(path) if path else None, "*"), characters=False)
