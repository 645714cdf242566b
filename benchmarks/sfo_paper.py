"""The published setting, for a GPU: ResNet-18 on CIFAR-100 (or CIFAR-10), 200 epochs, beside the papers' own figures.

Those are of arXiv 2508.05297 and 2508.05302, read off their public results: the lowest ‖∇f‖, there measured in train
mode, and the test accuracy in percent, both for CIFAR-100. Here ‖∇f‖ is measured in eval mode.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from sfo_contestants import Policy, Scale, Values, auto, budgeted, cosine_decay
from sfo_problems import Problem
from sfo_runs import Places, play

CONSTANT = {"kind": "constant"}
START_4 = {"1.1": ".00286 / 72.29", "1.2": ".00251 / 72.26", "1.3": ".00213 / 72.72", "1.4": ".00190 / 72.54"}


def paper(data: str, classes: int, epochs: float, subset: int | None) -> list[Problem]:
    """The runs of SGD and those of Adam; stages are shorter where the budget is."""
    sgd = _problem("paper", "ResNet-18, SGD", {"kind": "sgd"}, _sgd(), data, classes, epochs, subset)
    adam = {"kind": "adamw", "weight_decay": 0.0}
    return [sgd, _problem("paper-adam", "ResNet-18, Adam", adam, _adam(), data, classes, epochs, subset)]


def _problem(
    name: str,
    title: str,
    optimizer: Values,
    policies: Sequence[Policy],
    data: str,
    classes: int,
    epochs: float,
    subset: int | None,
) -> Problem:
    args = {"path": data, "subset": subset, "held_out": None, "classes": classes, "kind": "resnet18", "norm": "batch"}
    images = f"the first {subset:,} images" if subset else "all images"
    return Problem(
        name=name,
        title=f"{title}, CIFAR-{classes}",
        about=f"{images}, BatchNorm over whole batches, {epochs:g} epochs of gradient evaluations; published figures "
        "are for CIFAR-100 and 200 epochs, their ‖∇f‖ in train mode",
        scale=_scale(epochs),
        play=partial(play, places=Places(first=max(1.0, epochs / 100))),
        grad_norms=(0.05, 0.02, 0.01, 0.005),
        held_losses=(2.0, 1.5, 1.2),
        base={
            "task": {"kind": "target", "target": "sfo_tasks:cifar", "args": args},
            "optimizer": optimizer,
            "engine": {"kind": "torch", "max_micro": 512},
            "run": {"loader": {"workers": 4}},
        },
        policies=policies,
    )


def _scale(epochs: float) -> Scale:
    """Everything has the one budget."""
    return Scale(
        batches=(32,),
        lrs=(0.1,),
        decay_batches=(32,),
        decay_lrs=(0.1,),
        starts=((32, 0.1),),
        cap=512,
        long=epochs,
        open=epochs,
        budgets=(epochs,),
        periods=(epochs / 8,),
        auto_budgets=(epochs,),
    )


def _row(
    name: str, published: str, start: int, cap: int, rule: Mapping[str, Any], lr: float, family: str = "growth"
) -> Policy:
    """A run of the papers: b doubled in equal stages that share out the budget, η by a rule."""

    def grid(scale: Scale) -> Iterator[tuple[str, Values]]:
        stages = (cap // start).bit_length()
        growth = {"kind": "exponential", "start": start, "cap": cap}
        yield (
            f"η₀={lr:g}",
            {
                "growth": growth if stages > 1 else {"kind": "constant", "start": start},
                "stages": {"every": {"epochs": scale.long / stages}},
                "lr": {"base": lr, "rule": dict(rule)},
                "budget": {"epochs": scale.long},
            },
        )

    return Policy(name=name, grid=grid, family=family, published=published)


def _factor(factor: float) -> dict[str, Any]:
    return {"kind": "factor", "factor": factor}


def _sgd() -> list[Policy]:
    rows = [
        _row(f"b 4 → 512, γ={factor}", published, 4, 512, _factor(float(factor)), 0.1)
        for factor, published in START_4.items()
    ]
    return [
        *rows,
        _row("b 4 → 512, η ∝ b", ".00201 / 72.20", 4, 512, {"kind": "linear"}, 0.1),
        _row("b=32", ".01452 / 72.69; ‖∇f‖ .02 at 162 epochs", 32, 32, CONSTANT, 0.1, family="constant"),
        _row("b 32 → 256", ".00360 / 74.03; ‖∇f‖ .02 at 68 epochs", 32, 256, CONSTANT, 0.1),
        _row("b 32 → 256, γ=1.4", ".00262 / 74.16; ‖∇f‖ .02 at 75 epochs", 32, 256, _factor(1.4), 0.1),
        Policy(name="cosine decay", grid=cosine_decay, family="decay"),
        Policy(name="late", grid=budgeted("late")),
        Policy(name="auto", grid=auto),
    ]


def _adam() -> list[Policy]:
    return [
        _row("b=32", ".0191 / 69.90", 32, 32, CONSTANT, 1e-3, family="constant"),
        _row("b 32 → 256", ".00418 / 70.19", 32, 256, CONSTANT, 1e-3),
        _row("b 32 → 256, γ=1.4", ".0131 / 68.70", 32, 256, _factor(1.4), 1e-3),
    ]
