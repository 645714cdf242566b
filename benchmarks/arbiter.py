"""Batch schedules that are learned against a validation loss, on digits: `python benchmarks/arbiter.py`.

First the scheduler of the code published with Arbiter (arXiv 2205.08231): where its batch goes, with one random vector
W and with −W. Its batch is rounded, which passes no gradient, so what moves it is how W scales features, and no
derivative by the batch of anything. Then what is sound of the idea, as growth: branches with b and 2b from the same
state, on the same samples, of which the one with the least validation loss goes on.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import Report, arguments, keep, show
from sfo_tasks import mislabelled
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distgrow.core.budget import Budget
from distgrow.core.lr import LR
from distgrow.core.lr import Constant as ConstantRule
from distgrow.data.datasets import digits
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.constant import Constant
from distgrow.growth.learned import Learned as LearnedGrowth
from distgrow.tracking.branch_events import BranchTest
from distgrow.tracking.read import read_events
from distgrow.training.fit import fit
from distgrow.training.spec import RunSpec

SMALLEST, LARGEST, FIRST = 8, 512, 64
#: The first batch of the schedules by branches.
START = 16
LOGITS, WIDTH = 4, 32
#: Adam's rate of the scheduler. The code has 1e-5 … 1e-6, for two hundred times as many updates.
RATE = 1e-3
#: The rate of SGD for the branches.
ETA = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where the published scheduler's batch has gone."""

    seed: int
    with_w: int
    with_minus_w: int
    evaluations: int  #: full gradients on validation samples, of one of the two
    applied: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What a schedule has reached."""

    schedule: str
    seed: int
    batches: list[int]
    updates: int
    applied: int
    probe: int
    loss: float
    accuracy: float


# ── the published scheduler ─────────────────────────────────────────────────────────────────────────────────────


def size_of(logit: Tensor) -> int:
    """Return b(l): the batch of a logit."""
    return math.floor((LARGEST - SMALLEST) * torch.sigmoid(logit.detach()).item() + SMALLEST)


def logit_of(batch: int) -> Tensor:
    """Return l(b), clipped by 1e-3 at both ends."""
    return torch.logit(torch.tensor((batch - SMALLEST) / (LARGEST - SMALLEST), dtype=torch.float64), eps=1e-3)


class Scheduler(nn.Module):
    """Choose a logit of the batch from what a validation batch looks like."""

    def __init__(self, logits: int = LOGITS) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, logits))
        self.alpha = nn.Parameter(1e-6 * torch.randn(logits))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return l_α: the mean logits in order, weighted by softmax(α)."""
        return self.weighted(self.layers(inputs).mean(0))

    def weighted(self, logits: Tensor) -> Tensor:
        """Return Σ softmax(α)_n·l_n with the logits in order."""
        return (logits.sort().values * self.alpha.softmax(0)).sum()


class Network(nn.Module):
    """The classifier: its features may be scaled before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, inputs: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return logits of the classes, from z + stop(z)·scale."""
        z = self.features(inputs)
        return self.head(z if scale is None else z + z.detach() * scale)


def published(seed: int, sign: int, *, epochs: int) -> tuple[int, int, int]:
    """Train with the published scheduler; return its last batch, its own evaluations, and those of updates."""
    torch.manual_seed(seed)
    train, validation, _ = splits()
    network, scheduler, w = Network(), Scheduler(), sign * torch.randn(WIDTH) / WIDTH**0.5
    warm(scheduler, validation[0])
    inner = torch.optim.SGD(network.parameters(), lr=0.1)
    outer = torch.optim.Adam(scheduler.parameters(), lr=RATE, weight_decay=5e-4)
    batch, probed, applied = FIRST, 0, 0
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0])).split(batch):
            inner.zero_grad()
            F.cross_entropy(network(train[0][rows]), train[1][rows]).backward()
            inner.step()
            applied += len(rows)
            logit = scheduler(validation[0][torch.randint(len(validation[0]), (FIRST,))])
            drawn = torch.randint(len(validation[0]), (size_of(logit),))
            outer.zero_grad()
            F.cross_entropy(network(validation[0][drawn], w * logit), validation[1][drawn]).backward()
            outer.step()
            probed += len(drawn)
        with torch.no_grad():
            ordered = scheduler.layers(validation[0]).mean(0).sort().values
            batch = size_of(ordered[scheduler.alpha.argmax()])
            scheduler.alpha.copy_(1e-6 * torch.randn(LOGITS))
    return batch, probed, applied


def warm(scheduler: Scheduler, inputs: Tensor) -> None:
    """Train the scheduler until its batch is FIRST, to within 2."""
    adam = torch.optim.Adam(scheduler.parameters(), lr=1e-2)
    while abs(size_of(logit := scheduler(inputs)) - FIRST) >= 2:
        adam.zero_grad()
        F.smooth_l1_loss(logit, logit_of(FIRST).float()).backward()
        adam.step()


# ── branches ────────────────────────────────────────────────────────────────────────────────────────────────────


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss over the rows."""
    return F.cross_entropy(model(batch[0]), batch[1])


def splits() -> tuple[tuple[Tensor, Tensor], ...]:
    """Return images and labels for training, validation (a fifth of the training set) and test; a fifth are wrong."""
    train, test = (mislabelled(part, 0.2, seed) for seed, part in enumerate(digits()))
    cut = len(train.inputs) * 4 // 5
    first, last = (train.inputs[:cut], train.labels[:cut]), (train.inputs[cut:], train.labels[cut:])
    return first, last, (test.inputs, test.labels)


def loss_on(model: nn.Module, rows: tuple[Tensor, Tensor]) -> float:
    """Return the mean loss."""
    with torch.no_grad():
        return float(F.cross_entropy(model(rows[0]), rows[1]))


def trained(seed: int, folder: Path, *, rounds: int, growth: GrowthPolicy) -> Learned:
    """Train for so many epochs."""
    torch.manual_seed(seed)
    train, validation, test = splits()
    model, place = Network(), folder / f"{growth.name}-{seed}"
    result = fit(
        model, cross_entropy, TensorDataset(*train), test=TensorDataset(*validation), growth=growth,
        budget=Budget(epochs=rounds), lr=LR(base=ETA, rule=ConstantRule()),
        run=RunSpec(dir=str(place), seed=seed, log_every=10**6),
    )  # fmt: skip
    tests = [event for event in read_events(place / "metrics.jsonl") if isinstance(event, BranchTest)]
    with torch.no_grad():
        accuracy = float((model(test[0]).argmax(1) == digits()[1].labels).float().mean())
    progress = result.progress
    return Learned(
        schedule=growth.name, seed=seed, batches=[event.batch for event in tests] or [growth.start],
        updates=progress.step, applied=progress.ledger.applied, probe=progress.ledger.probe,
        loss=loss_on(model, test), accuracy=accuracy,
    )  # fmt: skip


def schedules(folder: Path, *, seeds: int, rounds: int) -> Iterator[Learned]:
    """Train with the learned schedule, of which a test is an epoch long, and with a constant batch."""
    for seed in range(seeds):
        learned = LearnedGrowth(start=START, cap=LARGEST, cost=1.0, tests=rounds, windows=4)
        yield trained(seed, folder, rounds=rounds, growth=learned)
        yield trained(seed, folder, rounds=rounds, growth=Constant(start=START))


def published_report(rows: Sequence[Published]) -> Report:
    """Return the table of the published scheduler."""
    return Report(
        title=f"Batch of the published scheduler at the end, from {FIRST}; it lies in {SMALLEST} … {LARGEST}",
        columns=["seed", "with W", "with −W", "evaluations of validation samples", "of updates"],
        rows=[
            [str(row.seed), str(row.with_w), str(row.with_minus_w), f"{row.evaluations:,}", f"{row.applied:,}"]
            for row in rows
        ],
    )


def learned_report(rows: Sequence[Learned]) -> Report:
    """Return the table of schedules."""
    return Report(
        title=f"Schedules on the digits, SGD at a rate of {ETA}: test loss after the same applied evaluations",
        columns=["schedule", "seed", "batches", "updates", "applied", "probe", "loss", "accuracy"],
        rows=[
            [
                row.schedule, str(row.seed), " ".join(map(str, row.batches)), f"{row.updates:,}", f"{row.applied:,}",
                f"{row.probe:,}", f"{row.loss:.3f}", f"{row.accuracy:.3f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main() -> None:
    """Measure, keep, show."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    seeds, epochs = (1, 2) if options.quick else (6, 30)
    found = list[Published]()
    for seed in range(seeds):
        (one, evaluations, applied), (other, _, _) = (published(seed, sign, epochs=epochs) for sign in (1, -1))
        found.append(Published(seed=seed, with_w=one, with_minus_w=other, evaluations=evaluations, applied=applied))
    with tempfile.TemporaryDirectory() as folder:
        trained = list(schedules(Path(folder), seeds=min(3, seeds), rounds=2 if options.quick else 10))
    if options.jsonl:
        keep(options.jsonl, [*found, *trained])
    show([published_report(found), learned_report(trained)], markdown=options.markdown)


if __name__ == "__main__":
    main()
