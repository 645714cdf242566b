"""The critical batch as growth estimates it while training, against the exact one: `python benchmarks/tracked.py`.

Softmax regression on noisy digits, as in sfo.py. Every 0.37 epochs, so that all places of an epoch are met, a probe
measures ‖∇f‖ and tr Σ over the whole training set; the line of metrics before it holds the estimates that the policy
went by, from gradients already computed. A policy's b* is κ·tr Σ/|∇f|² at the same κ for both, so κ cancels.
"""

import io
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import Report, Spread, arguments, keep, show, spread
from sfo_problems import digits
from sfo_runs import trained
from torch import Tensor
from torch.func import functional_call, grad, vmap

from distgrow.config.load import parse
from distgrow.tasks.task import Task
from distgrow.tracking.base_event import Line

EPOCHS, SEEDS = 30, 3
LIMIT = 0.25  #: largest distance of the median ratio from 1 that is good enough
POLICIES: Mapping[str, tuple[dict[str, Any], float]] = {
    "constant, b = 8": ({"kind": "constant", "start": 8}, 0.5),
    "constant, b = 32": ({"kind": "constant", "start": 32}, 0.3),
    "critical_batch, κ = 0.5": ({"kind": "critical_batch", "start": 8, "cap": 256, "kappa": 0.5}, 0.5),
    "noise_scale, share 0.5": ({"kind": "noise_scale", "start": 8, "cap": 256, "share": 0.5}, 0.5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Hold the ratios of estimates to exact values at the probes of a policy's runs."""

    policy: str
    probes: int
    variance: Spread
    grad_sq: Spread
    critical_batch: Spread
    mean_grad_sq: float  #: the mean of the estimates of ‖∇f‖² over the mean of the exact values


class Pairs:
    """A tracker that keeps each probe, and the exact tr Σ there, with the update before it."""

    def __init__(self, task: Task) -> None:
        self.found: list[tuple[Line, Line]] = []
        self._last: Line = {}
        self._task = task

    def log(self, event: Line) -> None:
        """Keep a probe once noise has been measured."""
        if event["event"] == "step":
            self._last = event
        elif event["event"] == "probe" and self._last.get("noise_trace"):
            variance = exact_variance(self._task)
            exact = {"noise_trace": variance, "noise_scale": variance / event["norm"] ** 2}
            self.found.append((self._last, {**event, **exact}))

    def close(self) -> None:
        """Do nothing: no file is open."""


def exact_variance(task: Task) -> float:
    """Return tr Σ: the variance of single samples' gradients, added up over all parameters."""
    parameters = {name: parameter.detach() for name, parameter in task.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(task.model, parameters, (row[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, task.train.inputs, task.train.labels)
    return sum(float(gradients.double().var(0).sum()) for gradients in each.values())


def pairs(growth: dict[str, Any], lr: float, seed: int, epochs: int) -> list[tuple[Line, Line]]:
    """Return the (step, probe) pairs of one run."""
    run = parse(
        {
            **digits().base,
            "growth": growth,
            "lr": {"base": lr},
            "budget": {"epochs": float(epochs)},
            "run": {"noise": {"every": 1}, "probe": {"every_epochs": 0.37}},
        }
    )
    torch.manual_seed(seed)
    task = run.task.build(None)
    tracker = Pairs(task)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        trained(run, task, tracker, seed, Path(folder) / "run")
    return tracker.found


def measure(*, quick: bool) -> Iterator[Agreement]:
    """Yield a row for each policy."""
    for name, (growth, lr) in POLICIES.items():
        seeds = range(1 if quick else SEEDS)
        found = [pair for seed in seeds for pair in pairs(growth, lr, seed, 2 if quick else EPOCHS)]
        yield Agreement(
            policy=name,
            probes=len(found),
            variance=spread([step["noise_trace"] / probe["noise_trace"] for step, probe in found]),
            grad_sq=spread([step["grad_sq"] / probe["norm"] ** 2 for step, probe in found]),
            mean_grad_sq=sum(step["grad_sq"] for step, _ in found) / sum(probe["norm"] ** 2 for _, probe in found),
            critical_batch=spread([scale(step) / probe["noise_scale"] for step, probe in found]),
        )


def scale(step: Line) -> float:
    """Return the estimated noise scale, or inf if the gradient was lost in noise."""
    return step["noise_scale"] or math.inf


def cells(row: Agreement) -> list[str]:
    """Return a row of the table."""
    met = "met" if abs(row.critical_batch.median - 1) <= LIMIT else "missed"
    found = [str(row.variance), str(row.grad_sq), f"{row.mean_grad_sq:.3f}", str(row.critical_batch)]
    return [row.policy, str(row.probes), *found, f"1 ± {LIMIT} {met}"]


def main() -> None:
    """Measure, and show the table."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    rows = list(measure(quick=options.quick))
    if options.jsonl:
        keep(options.jsonl, rows)
    report = Report(
        title="Estimated over exact: median (quartiles), and of ‖∇f‖² the ratio of the means",
        columns=["growth", "probes", "tr Σ", "‖∇f‖²", "‖∇f‖², means", "b*", "target"],
        rows=[cells(row) for row in rows],
    )
    show([report], markdown=options.markdown)


if __name__ == "__main__":
    main()
