"""The critical batch as growth estimates it while training, against the exact one: `python benchmarks/tracked.py`.

Softmax regression on noisy digits, as in sfo.py. Every 0.37 epochs, so that all places of an epoch are met, a probe
measures ‖∇f‖ and tr Σ over the whole training set; the line of metrics before it holds the estimates that the policy
went by, from gradients already computed. A policy's b* is κ·tr Σ/|∇f|² at the same κ for both, so κ cancels.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from paired import Report, Spread, show, spread
from torch import Tensor
from torch.func import functional_call, grad, vmap

from distgrow.config import parse
from distgrow.tasks import Task
from distgrow.track import Event
from distgrow.train import fit

EPOCHS, SEEDS = 30, 3
LIMIT = 0.25  #: largest distance of the median ratio from 1 that is good enough
POLICIES: Mapping[str, tuple[dict[str, Any], float]] = {
    "constant, b = 8": ({"kind": "constant", "start": 8}, 0.5),
    "constant, b = 32": ({"kind": "constant", "start": 32}, 0.3),
    "tracking, κ = 0.5": ({"kind": "tracking", "start": 8, "cap": 256, "kappa": 0.5}, 0.5),
    "gns, share 0.5": ({"kind": "gns", "start": 8, "cap": 256, "share": 0.5}, 0.5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Estimates over exact values at the probes of a policy's runs."""

    policy: str
    probes: int
    variance: Spread
    grad_sq: Spread
    critical_batch: Spread


class Pairs:
    """A tracker that keeps each probe, and the exact tr Σ there, with the update before it."""

    def __init__(self, task: Task) -> None:
        self.found: list[tuple[Event, Event]] = []
        self._last: Event = {}
        self._task = task

    def log(self, event: Event) -> None:
        """Keep a probe once noise has been measured."""
        if event["event"] == "step":
            self._last = event
        elif event["event"] == "probe" and self._last.get("noise_trace"):
            variance = exact_variance(self._task)
            exact = {"noise_trace": variance, "noise_scale": variance / event["norm"] ** 2}
            self.found.append((self._last, {**event, **exact}))

    def close(self) -> None:
        """Nothing is open."""


def exact_variance(task: Task) -> float:
    """tr Σ: the gradients of single samples, about their mean."""
    parameters = {name: parameter.detach() for name, parameter in task.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(task.model, parameters, (row[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, task.train.inputs, task.train.labels)
    return sum(float(gradients.double().var(0).sum()) for gradients in each.values())


def pairs(growth: dict[str, Any], lr: float, seed: int, epochs: int) -> list[tuple[Event, Event]]:
    """(step, probe) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run = parse(
            {
                "task": {"kind": "target", "target": "sfo_tasks:noisy_digits"},
                "growth": growth,
                "lr": {"base": lr},
                "optimizer": {"kind": "sgd", "weight_decay": 1e-3},
                "engine": {"kind": "torch", "max_micro": 2048, "device": "cpu"},
                "budget": {"epochs": float(epochs)},
                "run": {"dir": f"{folder}/run", "seed": seed, "noise": {"every": 1}, "probe": {"every_epochs": 0.37}},
            }
        )
        torch.manual_seed(seed)
        task = run.task.build(None)
        tracker = Pairs(task)
        fit(
            task.model,
            task.loss,
            task.train,
            growth=run.growth,
            lr=run.lr,
            budget=run.budget,
            optimizer=run.optimizer,
            engine=run.engine,
            run=run.run,
            trackers=[tracker],
        )
        return tracker.found


def measure(*, quick: bool) -> Iterator[Agreement]:
    """A row for each policy."""
    for name, (growth, lr) in POLICIES.items():
        seeds = range(1 if quick else SEEDS)
        found = [pair for seed in seeds for pair in pairs(growth, lr, seed, 2 if quick else EPOCHS)]
        yield Agreement(
            policy=name,
            probes=len(found),
            variance=spread([step["noise_trace"] / probe["noise_trace"] for step, probe in found]),
            grad_sq=spread([step["grad_sq"] / probe["norm"] ** 2 for step, probe in found]),
            critical_batch=spread([scale(step) / probe["noise_scale"] for step, probe in found]),
        )


def scale(step: Event) -> float:
    """The estimated noise scale; inf where the gradient was lost in noise."""
    return step["noise_scale"] or math.inf


def cells(row: Agreement) -> list[str]:
    """A row of the table."""
    met = "met" if abs(row.critical_batch.median - 1) <= LIMIT else "missed"
    spreads = [str(row.variance), str(row.grad_sq), str(row.critical_batch)]
    return [row.policy, str(row.probes), *spreads, f"1 ± {LIMIT} {met}"]


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: seconds, with numbers that mean nothing")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(measure(quick=options.quick))
    report = Report(
        title="Estimated over exact: median (quartiles)",
        columns=["growth", "probes", "tr Σ", "‖∇f‖²", "b*", "target"],
        rows=[cells(row) for row in rows],
    )
    show([report], markdown=options.markdown)
    print(f"median over policies: {statistics.median(row.critical_batch.median for row in rows):.3f}")


if __name__ == "__main__":
    main()
