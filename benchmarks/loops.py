"""What the benchmarks of the loop time: models and data, loops written by hand, and distgrow's own."""

import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.budget import Budget
from distgrow.core.extrapolate import Extrapolate
from distgrow.core.lr import LR
from distgrow.core.noise_stats import Measuring
from distgrow.core.plan import Plan
from distgrow.core.progress import Outcome, Progress
from distgrow.core.stages import Stages
from distgrow.data import datasets
from distgrow.distributed.world import World
from distgrow.engine.spec import DeepSpeed, EngineSpec, Torch, most_rows
from distgrow.growth import Growth
from distgrow.growth.base import Measure
from distgrow.growth.controller import Controller
from distgrow.optim import OptimizerSpec
from distgrow.optim.own import own
from distgrow.optim.sgd import SGD
from distgrow.run.folder import RunFolder
from distgrow.run.stop import StopRequests
from distgrow.tasks import models
from distgrow.tasks.architectures import GPT, Tokens
from distgrow.tasks.flops import flops_per_token
from distgrow.tasks.task import Task
from distgrow.tracking.base import NullTracker
from distgrow.tracking.jsonl import JSONL
from distgrow.training.result import Result
from distgrow.training.spec import RunSpec
from distgrow.training.trainer import Trainer

LR_BASE = 0.02
Model = Literal["cnn", "mlp", "resnet18", "gpt"]
#: Tokens of a row of the GPT, and its sizes: 30 million parameters, or a few thousand for smoke runs.
LENGTH, SMALL_LENGTH = 512, 16
SHAPE: dict[str, Any] = {"layers": 8, "width": 512, "heads": 8, "positions": "rotary", "mlp": "swiglu"}
SMALL_SHAPE: dict[str, Any] = {**SHAPE, "layers": 2, "width": 32, "heads": 2}


class Loop(Protocol):
    """A contestant."""

    def updates(self, count: int, micro: int, accum: int) -> None:
        """`count` updates of accum micro-batches of `micro` rows on each rank."""
        ...


# ── what is trained ─────────────────────────────────────────────────────────────────────────────────────────────


def cnn() -> nn.Module:
    """Three convolutions on (3, 32, 32)."""
    layers: list[nn.Module] = []
    for width_in, width in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.GroupNorm(width // 8, width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def build(model: Model, *, small: bool = False) -> Task:
    """The digits in memory, enlarged to (3, 32, 32) but for the MLP; for the GPT, random tokens.

    `small`: the ResNet has 8 layers and the GPT a few thousand parameters.
    """
    torch.manual_seed(0)
    if model == "gpt":
        return _gpt(small=small)
    train, test = datasets.digits()
    if model == "mlp":
        return Task(model=models.mlp(64, [128, 64], 10), loss=cross_entropy, train=train)
    widths, blocks = ([16, 32, 64], 1) if small else ([64, 128, 256, 512], 2)
    images = cnn() if model == "cnn" else models.resnet(3, 10, widths=widths, blocks=blocks, norm=models.batch_norm)
    return Task(model=images, loss=cross_entropy, train=enlarged(train), test=enlarged(test))


def enlarged(digits: datasets.Arrays) -> datasets.Arrays:
    """The digits in the shape of CIFAR's images."""
    images = F.interpolate(digits.inputs, scale_factor=4).expand(-1, 3, -1, -1).contiguous()
    return datasets.Arrays(images, digits.labels)


def _gpt(*, small: bool) -> Task:
    length, shape = (SMALL_LENGTH, SMALL_SHAPE) if small else (LENGTH, SHAPE)
    vocabulary, rows = (64, 256) if small else (8192, 2048)
    tokens = torch.randint(vocabulary, (rows, length + 1))
    model = GPT(**shape).build(Tokens(length=length, vocabulary=vocabulary))
    flops = flops_per_token(model, layers=shape["layers"], width=shape["width"], length=length)
    data = datasets.Arrays(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return Task(model=model, loss=cross_entropy, train=data, tokens=length, flops_per_token=flops)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over the rows, or over their tokens."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())


def torchs(optimizer: str, task: Task) -> torch.optim.Optimizer:
    """An optimizer of torch.optim by name, with its default settings."""
    return getattr(torch.optim, optimizer)(task.model.parameters(), lr=LR_BASE)


# ── the contestants ─────────────────────────────────────────────────────────────────────────────────────────────


class Rows:
    """Batches indexed out of a shuffled tensor."""

    def __init__(self, task: Task, world: World) -> None:
        self.world = world
        self.inputs, self.labels = task.train.inputs, task.train.labels
        self.shuffled, self.cursor = torch.randperm(len(self.inputs)), 0

    def __call__(self, share: int) -> Tensor:
        """Indices of this rank's `share` of the next global batch."""
        batch = share * self.world.size
        if self.cursor + batch > len(self.shuffled):
            self.shuffled, self.cursor = torch.randperm(len(self.inputs)), 0
        first = self.cursor + share * self.world.rank
        self.cursor += batch
        return self.shuffled[first : first + share]


class Bare:
    """The loop that one writes by hand: DDP and no_sync, autocast and compilation as `engine` has them."""

    def __init__(
        self, task: Task, world: World, *, engine: Torch | None = None, optimizer: str = "SGD", logging: bool = False
    ) -> None:
        engine = engine or Torch()
        self.logging, self.rows, self.device = logging, Rows(task, world), world.device
        self.model, self.loss = task.model.to(world.device), task.loss
        self.half = engine.precision == "bfloat16"
        if engine.compile:
            self.model.compile()
        self.ddp = DistributedDataParallel(task.model, gradient_as_bucket_view=True) if world.size > 1 else None
        self.optimizer = torchs(optimizer, task)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def updates(self, count: int, micro: int, accum: int) -> None:
        """`count` updates of accum micro-batches of `micro` rows on each rank."""
        model = self.model if self.ddp is None else self.ddp
        for _ in range(count):
            rows = self.rows(micro * accum)
            losses: list[Tensor] = []
            for k in range(accum):
                batch = rows[k * micro : (k + 1) * micro]
                quiet = self.ddp.no_sync() if self.ddp is not None and k < accum - 1 else nullcontext()
                inputs, labels = self.rows.inputs[batch].to(self.device), self.rows.labels[batch].to(self.device)
                with quiet:
                    with torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext():
                        loss = self.loss(model, (inputs, labels))
                    (loss / accum if accum > 1 else loss).backward()
                losses.append(loss.detach())
            if self.logging:
                self._log(losses)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _log(self, losses: list[Tensor]) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.norms.append(norm.item())
        self.losses.append(torch.stack(losses).mean().item())


class BareDeepSpeed:
    """The loop that one writes by hand around DeepSpeed's engine, which counts the accumulation itself."""

    def __init__(self, task: Task, world: World, zero: int, accum: int, *, logging: bool = False) -> None:
        import deepspeed

        self.logging, self.rows = logging, Rows(task, world)
        optimizer: Any = torch.optim.SGD(task.model.parameters(), lr=LR_BASE, fused=True)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accum,
            "zero_optimization": {"stage": zero, "reduce_bucket_size": int(25 * 2**20 / 4)},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**12,
        }
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=task.model, optimizer=optimizer, config=config)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def updates(self, count: int, micro: int, accum: int) -> None:
        """See Loop."""
        for _ in range(count):
            rows = self.rows(micro * accum)
            losses: list[Tensor] = []
            for k in range(accum):
                batch = rows[k * micro : (k + 1) * micro]
                loss = F.cross_entropy(self.engine(self.rows.inputs[batch]), self.rows.labels[batch])
                self.engine.backward(loss)
                self.engine.step()
                losses.append(loss.detach())
            if self.logging:
                self.norms.append(float(self.engine.get_global_grad_norm()))
                self.losses.append(torch.stack(losses).mean().item())


class Endless(Trainer):
    """The loop of a real run, which here ends without a checkpoint and keeps the moment at which each update ended."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.moments = deque[float](maxlen=1000)

    def log(self, progress: Progress, plan: Plan, outcome: Outcome, seconds: float) -> None:
        """Log, then look at the clock."""
        super().log(progress, plan, outcome, seconds)
        self.moments.append(time.perf_counter())

    def finish(self, progress: Progress) -> Result:
        """Nothing is written."""
        return Result(progress=progress, metrics={}, finished=True, dir=self.folder.path)


def build_job(
    task: Task,
    world: World,
    growth: Growth,
    *,
    engine: EngineSpec,
    folder: Path,
    stages: Stages | None = None,
    measuring: Measuring | None = None,
    optimizer: str | OptimizerSpec | None = None,
    extrapolate: Extrapolate | None = None,
    lr: float = LR_BASE,
) -> Endless:
    """All that fit() puts together, with metrics.jsonl in `folder` as the only tracker.

    `optimizer` is a spec, or names one of torch.optim, which is given as a user's own; None: distgrow's SGD.
    """
    folder.mkdir(exist_ok=True)
    run = RunSpec(dir=str(folder), checkpoint=Checkpointing(every_s=1e9))
    spec = own(torchs(optimizer, task)) if isinstance(optimizer, str) else optimizer or SGD()
    controller = Controller(
        growth=growth,
        stages=stages or Stages(),
        lr=LR(base=lr),
        budget=Budget(steps=1),
        epoch=len(task.train),
        world=world.size,
        max_micro=most_rows(engine.max_micro, len(task.train)),
        measuring=measuring or Measuring(),
        needs=frozenset({Measure.NOISE} if spec.goes_by_parts else ()),
    )
    machine = engine.build(
        task.model, task.loss, metrics=None, optimizer=spec, world=world, items=task.items, extrapolate=extrapolate
    )
    tracker = JSONL(folder / "metrics.jsonl") if world.rank == 0 else NullTracker()
    place = RunFolder(folder)
    return Endless(task, controller, machine, tracker, place, run, world, StopRequests(place))


def bare_loop(
    task: Task, world: World, engine: EngineSpec, accum: int, *, optimizer: str | None = None, logging: bool = False
) -> Loop:
    """The hand-written loop that an engine is held against; `optimizer` as for `build_job`."""
    if isinstance(engine, DeepSpeed):
        return BareDeepSpeed(task, world, engine.zero, accum, logging=logging)
    plain = engine if isinstance(engine, Torch) else None
    return Bare(task, world, engine=plain, optimizer=optimizer or "SGD", logging=logging)
