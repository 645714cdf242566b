"""The tasks of the benchmark of fronts: what is trained, by what, with which budget, batches and loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from front_sets import PENALTY, digits_minimum

EPOCH = 1437  #: samples of the digits to train on
IMAGES = "data/cifar10"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontTask:
    """Hold a task with its budget and grids."""

    name: str
    title: str
    about: str
    loss: str  #: what `loss` of an evaluation is, in words
    base: Mapping[str, Any]  #: task, model, optimizer and engine of a config
    samples: int  #: the budget, gradient evaluations of every run
    epoch: int  #: samples of the training set
    batches: Sequence[int]  #: constant batches
    starts: Sequence[int]  #: b₀ of growth
    cap: int  #: the most that growth comes to; nor more than 16·b₀
    first: int  #: η = 2^first is tried first at the smallest batch
    lowest: int = -14
    highest: int = 4
    power: float = 1.0  #: from one batch to the next the search begins at 2^power times the best η
    warmup: float = 0.0  #: part of the budget
    seeds: int = 3
    rows: int = 2048  #: of an evaluation at once
    evaluations: int = 16  #: of a run
    only: Sequence[str] = ()  #: names of schedules; none: all

    def cap_of(self, start: int) -> int:
        """Return the cap of growth from a batch."""
        return min(16 * start, self.cap)


# ── the tasks ───────────────────────────────────────────────────────────────────────────────────────────────────


def powers(first: int, last: int) -> list[int]:
    """Return the powers of two from one to another."""
    return [2**k for k in range(first.bit_length() - 1, last.bit_length())]


def target(name: str, *, module: str = "front_sets", **args: Any) -> dict[str, Any]:
    """Return a task's section of a config."""
    return {"kind": "target", "target": f"{module}:{name}", "args": args}


CPU = {"kind": "torch", "max_micro": 2048, "device": "cpu"}


def digits() -> FrontTask:
    """(a) Softmax regression, plain SGD."""
    return FrontTask(
        name="digits",
        title="The front on digits, softmax regression, 20 % of the labels wrong",
        about="1,437 samples, plain SGD, weight decay 1e-3 as a part of the objective",
        loss="the objective over the whole training set, penalty included",
        base={"task": target("digits_objective"), "optimizer": {"kind": "sgd", "weight_decay": PENALTY}, "engine": CPU},
        samples=8 * EPOCH,
        epoch=EPOCH,
        batches=powers(4, 1024),
        starts=powers(4, 256),
        cap=1024,
        first=-4,
    )


def digits_adamw() -> FrontTask:
    """(b) An MLP, AdamW."""
    optimizer = {"kind": "adamw", "weight_decay": 0.01}
    return FrontTask(
        name="digits-mlp",
        title="The front on digits, an MLP with AdamW, 20 % of the labels wrong",
        about="1,437 samples, one hidden layer of 64, AdamW",
        loss="the held-out loss, of 360 samples whose labels are as noisy",
        base={"task": target("digits_mlp"), "optimizer": optimizer, "engine": CPU},
        samples=6 * EPOCH,
        epoch=EPOCH,
        batches=powers(8, 512),
        starts=powers(8, 128),
        cap=512,
        first=-10,
        seeds=5,
        power=0.5,
    )


def cifar(path: str, *, gpu: bool = False, subset: int = 20_000, epochs: float = 8) -> FrontTask:
    """(c) A ResNet, plain SGD."""
    subset, epochs, kind = (50_000, 30.0, "resnet18") if gpu else (subset, epochs, "resnet8")
    args = {"path": path, "subset": subset, "held_out": min(10_000, max(64, subset // 5)), "kind": kind}
    return FrontTask(
        name="cifar",
        title=f"The front on CIFAR-10, {kind}",
        about=f"GroupNorm, the first {subset:,} training images, shifted and mirrored, plain SGD",
        loss=f"the held-out loss, of {args['held_out']:,} test images",
        base={
            "task": {"kind": "target", "target": "sfo_tasks:cifar", "args": args},
            "optimizer": {"kind": "sgd"},
            "engine": {"kind": "torch", "max_micro": 512},
        },
        samples=round(epochs * subset),
        epoch=subset,
        batches=powers(16, 4096) if gpu else powers(8, 1024),
        starts=powers(16, 1024) if gpu else powers(8, 256),
        cap=8192 if gpu else 2048,
        first=-4,
        rows=512,
    )


SMALL, LARGE = (64, 4, 128, 4), (256, 8, 384, 6)


def text(optimizer: str, *, samples: int = 48_000, shape: Sequence[int] = SMALL) -> FrontTask:
    """(d) A byte GPT, one pass; `shape` is its length, layers, width and heads."""
    length, layers, width, heads = shape
    held_out = min(2048, max(64, samples // 40))
    size = (samples + held_out) * length
    sizes: dict[str, Any] = {"length": length, "layers": layers, "width": width, "heads": heads}
    settings = {"beta2": 0.95} if optimizer == "adamw" else {}
    return FrontTask(
        name="text" if optimizer == "adamw" else f"text-{optimizer}",
        title=f"The front on text, a byte GPT with {'AdamW' if optimizer == 'adamw' else optimizer.capitalize()}",
        about=f"{layers} layers of width {width}, one pass over {samples:,} windows of "
        f"{length} bytes of the standard library's and installed packages' sources, {size / 1e6:.1f} MB with "
        f"what is held out",
        loss=f"the held-out loss, of {held_out:,} windows",
        base={
            "task": target("sources_text", samples=samples, held_out=held_out, **sizes),
            "optimizer": {"kind": optimizer, "weight_decay": 0.1, "clip": 1.0, **settings},
            "engine": {"kind": "torch", "max_micro": 256},
        },
        samples=samples,
        epoch=samples,
        batches=powers(8, 1024),
        starts=powers(8, 256),
        cap=2048,
        first=-9,
        power=0.5,
        warmup=0.02,
        rows=512,
    )


#: What runs on held-out tasks: every decay, the default, and what else it could have been with AdamW.
JUDGED = ("constant", "linear-decay", "cosine", "wsd50", "wsd70", "wsd80", "late", "auto")
UNSEEN = 4096  #: samples that their loss is of


def held_out(name: str, rows: int, optimizer: Mapping[str, Any], **own: Any) -> FrontTask:
    """Return a task that the default was not chosen on, one pass over its samples; `name` is its function's."""
    return FrontTask(
        name=f"held-{name}",
        base={
            "task": target(name, module="front_held_out", samples=rows, held_out=UNSEEN),
            "optimizer": optimizer,
            "engine": CPU,
        },
        samples=rows,
        epoch=rows,
        batches=powers(8, 1024),
        starts=powers(8, 256),
        cap=1024,
        only=JUDGED,
        **own,
    )


def held_out_teacher(rows: int = 40_960) -> FrontTask:
    """(e) A net fitted to a noisy net, SGD with momentum."""
    return held_out(
        "teacher", rows, {"kind": "sgd", "momentum": 0.9},
        title="The front on a held-out task, a noisy teacher with SGD and momentum",
        about=f"A net with one hidden layer of 64 is fitted to a random net of 64 inputs whose outputs have noise, one "
        f"pass over {rows:,} samples, SGD with momentum .9",
        loss=f"the mean squared error on {UNSEEN:,} further samples; of the noise alone it is .25",
        first=-6,
    )  # fmt: skip


def held_out_packages(rows: int = 32_768) -> FrontTask:
    """(f) A convolution that tells sources apart, AdamW."""
    return held_out(
        "packages", rows, {"kind": "adamw", "weight_decay": 0.01},
        title="The front on a held-out task, sources to tell apart with AdamW",
        about=f"Which of eight packages of the standard library 64 bytes are from, by a convolution over bytes, one "
        f"pass over {rows:,} windows, AdamW",
        loss=f"the held-out loss, of {UNSEEN:,} windows of other files",
        first=-8, power=0.5, seeds=5,
    )  # fmt: skip


def quick(task: FrontTask) -> FrontTask:
    """Return a task for seconds: the numbers mean nothing."""
    first = task.batches[3]
    only = ("constant", "linear-decay", "matched", "matched-30", "auto", "seesaw", "cosine")
    only = [name for name in task.only if name in only] or only
    return replace(
        task, samples=min(task.samples, 16 * first), batches=[first, 2 * first], starts=[first], cap=4 * first,
        seeds=2, only=only, lowest=task.first, highest=task.first + 1, evaluations=2,
    )  # fmt: skip


def tasks(
    path: str, *, gpu: bool, small: bool, budget: int | None, shape: Sequence[int] | None = None
) -> list[FrontTask]:
    """Return all tasks.

    Args:
        path: The folder with CIFAR's Parquet files.
        gpu: Whether those with nets have the sizes of a GPU.
        small: Whether they are those of a smoke run.
        budget: Gradient evaluations of a run, instead of each task's own.
        shape: Length, layers, width and heads of the GPT, instead of its own.
    """
    samples, shape = budget or (200_000 if gpu else 48_000), shape or (LARGE if gpu else SMALL)
    if small:
        samples, shape = 1024, (16, 1, 32, 2)
    words = [text(kind, samples=samples, shape=shape) for kind in ("adamw", "muon")]
    images = cifar(path, subset=256, epochs=4) if small else cifar(path, gpu=gpu)
    made = [digits(), digits_adamw(), images, *words, held_out_teacher(), held_out_packages()]
    return [quick(task) if small else replace(task, samples=budget or task.samples) for task in made]


def floor(task: FrontTask) -> float:
    """Return the least value that the loss can have, if it is known, else NaN."""
    return digits_minimum() if task.name == "digits" else math.nan
