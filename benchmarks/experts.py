"""How many experts should be active, by the number of rules that go together: `python benchmarks/experts.py`.

A task small enough to be trained a hundred times: 8 rules, each a random function of 4 numbers; c of them apply to a
sample, a multi-hot vector says which, and the sum of their values is to be predicted. One layer of 8 experts, of which
k are active, learns it from m samples. For c ≥ 2 a quarter of the sets of rules is held out: the error is that on new
inputs of known sets, and on new sets. Beside the best k stands k* of `distgrow.theory.experts` at p = 1, c^⅔·m^⅓ times
one constant, fitted to all of the measured ones.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from paired import Report, arguments, keep, show, tell
from torch import Tensor, nn

from distgrow.report.plots import COLOURS
from distgrow.tasks.experts import Active, Experts, with_balance
from distgrow.theory.experts import best_active

RULES, INPUTS, WIDTH = 8, 4, 16
ACTIVE, TOGETHER, SAMPLES, SEEDS = (1, 2, 4, 8), (1, 2, 4, 6), (500, 4000), 2
UPDATES, BATCH, LR, BALANCE = 500, 128, 0.01, 0.01
TEST = 4000
SHARES = (0.05, 0.1, 0.2, 0.4)  #: ticks of the figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Errors after one training, as shares of the variance of what is predicted."""

    rules: int  #: c
    samples: int  #: m
    active: int  #: k
    seed: int
    known: float  #: new inputs, sets of rules that were trained on
    new: float | None  #: new inputs, sets of rules that were not; None for c = 1, of which all are trained on


class Task:
    """Rules, and which sets of them are trained on."""

    def __init__(self, together: int, seed: int) -> None:
        numbers = np.random.default_rng([seed, together])
        self._inside = torch.from_numpy(numbers.normal(size=(RULES, INPUTS, 8))).float()
        self._outside = torch.from_numpy(numbers.normal(size=(RULES, 8))).float()
        sets = torch.zeros(math.comb(RULES, together), RULES)
        for row, chosen in enumerate(itertools.combinations(range(RULES), together)):
            sets[row, list(chosen)] = 1.0
        sets = sets[torch.from_numpy(numbers.permutation(len(sets)))]
        held = len(sets) // 4 if together > 1 else 0
        self.known, self.new = sets[held:], sets[:held]

    def drawn(self, sets: Tensor, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return (inputs and multi-hot vector, what is to be predicted) of so many samples."""
        numbers = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, INPUTS, generator=numbers)
        rules = sets[torch.randint(len(sets), (rows,), generator=numbers)]
        values = torch.einsum("nri,ri->nr", torch.tanh(torch.einsum("nd,rdi->nri", x, self._inside)), self._outside)
        return torch.cat([x, rules], dim=1), (values * rules).sum(1, keepdim=True)


class Layer(nn.Module):
    """Embed a sample as one token, give it to the experts, and read one number."""

    def __init__(self, active: int) -> None:
        super().__init__()
        self.embed, self.read = nn.Linear(INPUTS + RULES, WIDTH), nn.Linear(WIDTH, 1)
        self.experts = Experts(WIDTH, self._expert, count=RULES, active=Active(active), coefficient=BALANCE)

    def _expert(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        token = self.embed(x)
        return self.read(token + self.experts(token.unsqueeze(1)).squeeze(1))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def trained(task: Task, samples: int, active: int, seed: int, updates: int) -> nn.Module:
    """Return the layer after so many updates of AdamW, its learning rate falling to 0 along half a cosine."""
    torch.manual_seed(seed)
    model = Layer(active)
    loss = with_balance(model, squares)
    x, y = task.drawn(task.known, samples, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        rows = torch.randint(samples, (BATCH,))
        optimizer.zero_grad()
        loss(model, (x[rows], y[rows])).backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def left(model: nn.Module, task: Task, sets: Tensor, seed: int) -> float | None:
    """Return the share of the variance that is left on new samples of these sets."""
    if not len(sets):
        return None
    x, y = task.drawn(sets, TEST, seed + 10_000)
    return float(squares(model, (x, y)) / y.var())


def measure(
    together: Sequence[int], samples: Sequence[int], active: Sequence[int], seeds: int, updates: int
) -> Iterator[Error]:
    """Train every number of active experts on every task."""
    for seed, c, m in itertools.product(range(seeds), together, samples):
        task = Task(c, seed)
        for k in active:
            model = trained(task, m, k, seed, updates)
            known, new = (left(model, task, sets, seed) for sets in (task.known, task.new))
            assert known is not None
            yield Error(rules=c, samples=m, active=k, seed=seed, known=known, new=new)
        tell(f"c = {c}, m = {m}, seed {seed}")


def mean(errors: Sequence[Error], c: int, m: int, k: int) -> tuple[float, float]:
    """Return the geometric mean over seeds of the error, on new sets if there are any, and its scatter as a factor."""
    own = [e for e in errors if (e.rules, e.samples, e.active) == (c, m, k)]
    logs = [math.log(e.known if e.new is None else e.new) for e in own]
    return math.exp(statistics.fmean(logs)), math.exp(statistics.pstdev(logs))


def best(errors: Sequence[Error], c: int, m: int) -> int:
    """Return the measured best number of active experts."""
    numbers = sorted({error.active for error in errors})
    return min(numbers, key=lambda k: mean(errors, c, m, k)[0])


def predicted(errors: Sequence[Error], places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Return k* at each (c, m), at p = 1 and the dimension that fits the measured best numbers on average."""
    shape = {(c, m): best_active(c, 1.0, 1.0, m, 1.0) for c, m in places}
    ratios = [math.log(best(errors, *place) / shape[place]) for place in places]
    return {place: k * math.exp(statistics.fmean(ratios)) for place, k in shape.items()}


def report(errors: Sequence[Error]) -> Report:
    """Return a row for each task: the error by k, the best k and k*."""
    places = sorted({(error.rules, error.samples) for error in errors})
    numbers, stars = sorted({error.active for error in errors}), predicted(errors, places)
    rows: list[list[str]] = []
    for c, m in places:
        shown = [mean(errors, c, m, k) for k in numbers]
        cells = [f"{error:.3f} (×{scatter:.2f})" for error, scatter in shown]
        rows.append([f"{c}", f"{m:,}", *cells, f"{best(errors, c, m)}", f"{stars[c, m]:.1f}"])
    return Report(
        title="share of the variance left, geometric mean over seeds (and their scatter)",
        columns=["c", "m", *(f"k = {k}" for k in numbers), "best k", "k*"],
        rows=rows,
    )


def figure(errors: Sequence[Error]) -> Figure:
    """A panel for each m: the error along k, a line for each c, its least value marked."""
    drawn = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
    sizes, numbers = sorted({e.samples for e in errors}), sorted({e.active for e in errors})
    for axis, m in zip(np.atleast_1d(drawn.subplots(1, len(sizes), sharey=True)), sizes, strict=True):
        for at, c in enumerate(sorted({e.rules for e in errors})):
            values = [mean(errors, c, m, k) for k in numbers]
            colour, k = COLOURS[at % len(COLOURS)], best(errors, c, m)
            axis.plot(numbers, [v for v, _ in values], color=colour, marker="o", markersize=4, label=f"c = {c}")
            axis.fill_between(numbers, [v / s for v, s in values], [v * s for v, s in values], color=colour, alpha=0.12)
            axis.plot([k], [mean(errors, c, m, k)[0]], color=colour, marker="o", markersize=10, fillstyle="none")
        axis.set(xscale="log", yscale="log", xlabel="active experts k", title=f"m = {m:,} samples")
        axis.set_xticks(numbers, [str(k) for k in numbers])
        axis.set_yticks(SHARES, [f"{share:g}" for share in SHARES])
        axis.minorticks_off()
        axis.grid(alpha=0.3, linewidth=0.5)
    drawn.axes[0].set_ylabel("share of the variance left")
    drawn.axes[-1].legend(frameon=False, fontsize=8)
    return drawn


def main() -> None:
    """Measure, and show the table; with --plots draw it."""
    parser = arguments(__doc__)
    parser.add_argument("--plots", type=Path, help="folder that the figure is written to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    grid = ((1, 4), (200,), (1, 8), 1, 30) if options.quick else (TOGETHER, SAMPLES, ACTIVE, SEEDS, UPDATES)
    errors = list(measure(*grid))
    if options.jsonl:
        keep(options.jsonl, errors)
    if options.plots:
        figure(errors).savefig(options.plots / "experts.png")
    show([report(errors)], markdown=options.markdown)


if __name__ == "__main__":
    main()
