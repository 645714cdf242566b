"""Sizes of the SFO benchmark: which tasks, how much of them, on which grids; and the options that ask for them."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sfo_contestants import Scale
from sfo_paper import paper
from sfo_problems import Problem, cifar10, digits, quadratic, text

from distgrow.core.errors import ConfigError

README = Path(__file__).parent / "README.md"
SEEDS = {"standard": 5, "quick": 1, "smoke": 1, "full": 3}


def positive(text: str) -> int:
    """A whole number above 0, as argparse wants to be told."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number above 0")
    return number


def positive_real(text: str) -> float:
    """A number above 0, as argparse wants to be told."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the benchmark and what is made of its results both have to be told."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="minutes on two cores: less data, thin grids, one seed")
    size.add_argument("--smoke", action="store_true", help="seconds, with numbers that mean nothing")
    size.add_argument("--full", action="store_true", help="for a GPU: the published setting, ResNet-18 on CIFAR")
    parser.add_argument("--task", nargs="+", default=[], help="which tasks, by name; default: all")
    parser.add_argument("--data", default="data/cifar10", help="folder of CIFAR's Parquet files")
    parser.add_argument("--classes", type=int, choices=(10, 100), default=10, help="--full: which CIFAR is there")
    parser.add_argument("--subset", type=positive, help="training images, the first ones; default: 6000, --full: all")
    parser.add_argument("--epochs", type=positive_real, help="budget of runs on images; default: 24, --full: 200")
    parser.add_argument("--results", type=Path, help="folder of the results; default: runs/sfo, one for each size")
    parser.add_argument(
        "--readme",
        nargs="?",
        type=Path,
        const=README,
        help="put tables into this file, plots beside; default: README.md",
    )


def size_of(options: argparse.Namespace) -> str:
    """Return the size that is asked for."""
    return next((name for name in SEEDS if getattr(options, name, False)), "standard")


def folder_of(options: argparse.Namespace) -> Path:
    """Return the folder of the results."""
    size = size_of(options)
    return options.results or Path("runs") / ("sfo" if size == "standard" else f"sfo-{size}")


def problems(options: argparse.Namespace) -> list[Problem]:
    """The tasks that are asked for. ConfigError for a name that is none of theirs."""
    size, data = size_of(options), options.data
    if size == "full":
        made = paper(data, options.classes, options.epochs or 200.0, options.subset)
    elif size == "standard":
        made = [quadratic(), digits(), cifar10(data, options.subset or 6000, options.epochs or 24.0), text()]
    else:
        made = quick(data, options.subset or 128, options.epochs or 3.0) if size == "quick" else smoke()
    return chosen(made, options.task)


def quick(data: str, subset: int, epochs: float) -> list[Problem]:
    """Minutes on two cores: less data, thin grids."""
    few = digits()
    thin = replace(
        few.scale,
        batches=(32, 128),
        lrs=(0.03, 0.1),
        decay_batches=(8, 32),
        decay_lrs=(0.5, 1.0),
        starts=((8, 0.5),),
        long=100,
        budgets=(20,),
        periods=(2, 3),
        auto_budgets=(4, 16),
    )
    words = text(samples=256, epochs=2.0, length=32, layers=2, width=64, looks=4)
    nets = [cifar10(data, subset, epochs, looks=4), words]
    return [quadratic(), replace(few, scale=thin), *(replace(net, scale=smallest(net.scale)) for net in nets)]


def smoke() -> list[Problem]:
    """Seconds; the numbers mean nothing."""
    made = [quadratic(), digits(), text(samples=64, epochs=1.0, length=16, layers=1, width=16)]
    return [replace(problem, scale=smallest(problem.scale, longest=1.0)) for problem in made]


def smallest(scale: Scale, longest: float = math.inf) -> Scale:
    """One setting or few of every policy, whose runs have at most `longest` epochs."""
    return replace(
        scale,
        batches=scale.batches[:1],
        lrs=scale.lrs[:1],
        decay_batches=scale.decay_batches[:1],
        decay_lrs=scale.decay_lrs[:1],
        starts=scale.starts[:1],
        long=min(scale.long, longest),
        open=min(scale.open, longest),
        budgets=[min(scale.budgets[0], longest)],
        periods=[min(scale.periods[0], longest / 4)],
        auto_budgets=[min(scale.auto_budgets[-1], longest)],
    )


def chosen(problems: Sequence[Problem], names: Sequence[str]) -> list[Problem]:
    """Those of some names; all where none is given. ConfigError for a name that is none of theirs."""
    if unknown := set(names) - {problem.name for problem in problems}:
        known = ", ".join(problem.name for problem in problems)
        raise ConfigError(f"--task {' '.join(sorted(unknown))}: choose from {known}")
    return [problem for problem in problems if not names or problem.name in names]
