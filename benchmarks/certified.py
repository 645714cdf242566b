"""What growth by branches gives and costs, on digits: `python benchmarks/certified.py`.

A fifth of the labels are wrong, anew whenever a row is drawn, so nothing is learned by heart. Every run ends with the
same anneal of its learning rate, over the last fifth of its samples, and may spend as many gradient evaluations as any
other: certified growth pays for its branches, so it applies fewer samples, and so does "less 10 %". Constant batches
have the rate that lr.rule gives them.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from paired import Report, arguments, keep, show
from torch import Tensor, nn

from distgrow.core.budget import Budget
from distgrow.core.lr import LR, WSD, Linear, Sqrt
from distgrow.data.datasets import Arrays, digits
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.certified import Certified
from distgrow.growth.constant import Constant
from distgrow.optim import OptimizerSpec
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.training.fit import fit
from distgrow.training.spec import RunSpec

SMALL, LARGE, WIDTH = 16, 256, 64
#: Shares of the samples applied that branches may cost; the first is the default.
COSTS = (0.1, 0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model, and how it is trained."""

    name: str
    hidden: bool  #: a hidden layer of WIDTH
    optimizer: OptimizerSpec
    lr: LR


class Relabelled(Arrays):
    """Digits of which a share is labelled wrongly, anew whenever a row is drawn: nothing can be learned by heart."""

    share = 0.2

    def batch(self, indices: Any, seeds: Any) -> Any:
        """Return the collated rows."""
        inputs, labels = super().batch(indices, seeds)
        wrong = (seeds >> np.uint64(40)) / 2.0**24 < self.share
        shift = np.where(wrong, 1 + (seeds % np.uint64(9)).astype(np.int64), 0)
        return inputs, (labels + torch.from_numpy(shift)) % 10

    def expected_loss(self, model: nn.Module) -> float:
        """Return the mean loss over all rows and labels that they may have."""
        with torch.no_grad():
            logs = model(self.inputs).log_softmax(1)
        right = logs.gather(1, self.labels[:, None])[:, 0]
        return -float(((1 - self.share) * right + self.share * (logs.sum(1) - right) / 9).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What a run has reached."""

    setting: str
    schedule: str
    seed: int
    updates: int
    applied: int
    probe: int
    last_batch: int
    loss: float  #: expected, over the training images and all labels


def settings() -> list[Setting]:
    """Return what is trained."""
    anneal, momentum_free = WSD(decay=0.2), SGD()
    linear, sqrt = LR(base=0.1, rule=Linear(), decay=anneal), LR(base=0.5, rule=Sqrt(), decay=anneal)
    adam = LR(base=0.004, rule=Sqrt(), decay=anneal)
    return [
        Setting(name="softmax, SGD, η ∝ √b", hidden=False, optimizer=momentum_free, lr=sqrt),
        Setting(name="hidden layer, SGD, η ∝ b", hidden=True, optimizer=momentum_free, lr=linear),
        Setting(name="hidden layer, AdamW, η ∝ √b", hidden=True, optimizer=AdamW(), lr=adam),
    ]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss over the rows."""
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(setting: Setting, name: str, growth: GrowthPolicy, samples: int, seed: int, folder: Path) -> Ended:
    """Train once."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)] if setting.hidden else [nn.Linear(64, 10)]
    model = nn.Sequential(nn.Flatten(), *layers)
    images, _ = digits()
    train = Relabelled(images.inputs, images.labels)
    lr = setting.lr
    if isinstance(growth, Constant):
        assert lr.rule is not None and lr.base != "auto"
        lr = lr.model_copy(update={"base": lr.base * lr.rule.factor_for(growth.start / SMALL)})
    result = fit(
        model, cross_entropy, train, growth=growth, lr=lr, optimizer=setting.optimizer,
        budget=Budget(samples=samples), run=RunSpec(dir=str(folder), seed=seed, log_every=10**6),
    )  # fmt: skip
    progress = result.progress
    return Ended(
        setting=setting.name,
        schedule=name,
        seed=seed,
        updates=progress.step,
        applied=progress.ledger.applied,
        probe=progress.ledger.probe,
        last_batch=growth.stage_batch(progress.stage),
        loss=train.expected_loss(model),
    )


def runs(folder: Path, *, evaluations: int, seeds: int) -> Iterator[Ended]:
    """Train every setting by every schedule, all with as many evaluations."""
    schedules: dict[str, tuple[GrowthPolicy, int]] = {
        f"constant, {SMALL}": (Constant(start=SMALL), evaluations),
        f"constant, {LARGE}": (Constant(start=LARGE), evaluations),
    }
    for cost in COSTS:
        less = int(evaluations / (1 + cost))
        name = f"certified, cost: {cost:g}"
        schedules[f"constant, {SMALL}, less {100 * cost:g} %"] = (Constant(start=SMALL), less)
        schedules[name] = (Certified(start=SMALL, cap=LARGE, cost=cost), less)
    kept = Certified(start=SMALL, cap=LARGE, cost=COSTS[0], rates="kept")
    schedules[f"certified, cost: {COSTS[0]:g}, rates: kept"] = (kept, int(evaluations / (1 + COSTS[0])))
    for number, setting in enumerate(settings()):
        for seed in range(seeds):
            for name, (growth, samples) in schedules.items():
                place = folder / f"{number}-{seed}-{growth.name}-{samples}-{growth.start}-{len(name)}"
                yield trained(setting, name, growth, samples, seed, place)


def report(rows: Sequence[Ended], setting: str) -> Report:
    """Return the table of one setting: means over seeds, and differences to the small batch paired by seed."""
    own = [row for row in rows if row.setting == setting]
    small = {row.seed: row for row in own if row.schedule == f"constant, {SMALL}"}
    lines: list[list[str]] = []
    for schedule in dict.fromkeys(row.schedule for row in own):
        some = [row for row in own if row.schedule == schedule]
        gaps = [row.loss - small[row.seed].loss for row in some]
        updates = statistics.mean(row.updates for row in some)
        fewer = 1 - updates / statistics.mean(row.updates for row in small.values())
        lines.append(
            [
                schedule, f"{updates:,.0f}", f"{fewer:.0%}", f"{statistics.mean(row.applied for row in some):,.0f}",
                f"{statistics.mean(row.probe for row in some):,.0f}", " ".join(str(row.last_batch) for row in some),
                f"{statistics.mean(row.loss for row in some):.4f}",
                f"{statistics.mean(gaps):+.4f} ({min(gaps):+.4f} … {max(gaps):+.4f})",
            ]
        )  # fmt: skip
    return Report(
        title=f"{setting}: expected loss after the same evaluations, mean over {len(small)} seeds",
        columns=[
            "schedule", "updates", "fewer", "applied", "probe", "last batches", "loss", f"less that of {SMALL} (seeds)",
        ],
        rows=lines,
    )  # fmt: skip


def main() -> None:
    """Measure, keep, show."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    evaluations, seeds = (16_000, 1) if options.quick else (120_000, 3)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(runs(Path(folder), evaluations=evaluations, seeds=seeds))
    if options.jsonl:
        keep(options.jsonl, rows)
    show([report(rows, setting.name) for setting in settings()], markdown=options.markdown)


if __name__ == "__main__":
    main()
