"""Batch schedules that are learned against a validation loss, on digits: `python benchmarks/arbiter.py`.

First the scheduler of the code published with Arbiter (arXiv 2205.08231): where its batch goes, with one random vector
W and with −W. Its batch is rounded, which passes no gradient, so what moves it is how W scales features, and no
derivative by the batch of anything. Then what is sound of the idea: branches with other batches from the same
parameters, on the same samples, of which the one with the least validation loss goes on.
"""

import copy
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

from distgrow.core.budget import Budget
from distgrow.core.lr import LR
from distgrow.data.datasets import digits
from distgrow.growth.constant import Constant
from distgrow.training.fit import fit
from distgrow.training.spec import RunSpec

SMALLEST, LARGEST, FIRST = 8, 512, 64
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


def branch(model: nn.Module, rows: list[tuple[Tensor, Tensor]], batch: int, folder: Path) -> tuple[nn.Module, int]:
    """Train a copy of the model on the rows once; return it and its updates. SGD without momentum keeps no state."""
    branched = copy.deepcopy(model)
    result = fit(
        branched, cross_entropy, rows, growth=Constant(start=batch), budget=Budget(epochs=1), lr=LR(base=ETA),
        run=RunSpec(dir=str(folder), log_every=10**6),
    )  # fmt: skip
    return branched, result.progress.step


def learned(seed: int, folder: Path, *, rounds: int, choices: Sequence[float], name: str) -> Learned:
    """In every round, go on with the one of the branches at `choices` times the batch that validates best."""
    torch.manual_seed(seed)
    train, validation, test = splits()
    model: nn.Module = Network()
    batch, updates, probe, batches = 16, 0, 0, list[int]()
    for number in range(rounds):
        order = torch.randperm(len(train[0]))
        rows = [(train[0][row], train[1][row]) for row in order]
        found: list[tuple[float, int, nn.Module, int]] = []
        for factor in choices:
            size = min(LARGEST, max(SMALLEST, round(factor * batch)))
            place = folder / f"{name}-{seed}-{number}-{factor}"
            branched, steps = branch(model, rows, size, place)
            found.append((loss_on(branched, validation), size, branched, steps))
        _, batch, model, steps = min(found, key=lambda one: one[0])
        batches.append(batch)
        updates, probe = updates + steps, probe + (len(choices) - 1) * len(rows)
    with torch.no_grad():
        accuracy = float((model(test[0]).argmax(1) == digits()[1].labels).float().mean())
    return Learned(
        schedule=name, seed=seed, batches=batches, updates=updates, applied=rounds * len(train[0]), probe=probe,
        loss=loss_on(model, test), accuracy=accuracy,
    )  # fmt: skip


def schedules(folder: Path, *, seeds: int, rounds: int) -> Iterator[Learned]:
    """Train with the learned schedule and with a constant batch, on the same samples."""
    for seed in range(seeds):
        yield learned(seed, folder, rounds=rounds, choices=(0.5, 1, 2), name="learned by branches")
        yield learned(seed, folder, rounds=rounds, choices=(1,), name="constant")


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
