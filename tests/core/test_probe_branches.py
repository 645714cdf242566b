"""What branches of a checkpoint are allowed to be, and how their losses are compared."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from distgrow import budget, constant, exponential, sqrt_lr
from distgrow.config.load import parse
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, Cosine
from distgrow.core.progress import Progress
from distgrow.critical_batch.branches import (
    Branch,
    ProbeOptions,
    Trunk,
    lr_factor,
    resolve,
    samples_left,
)
from distgrow.critical_batch.figure import BranchResult, figure
from distgrow.growth.branching import largest_no_worse
from distgrow.growth.controller import Controller
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.run.folder import RunFolder
from distgrow.training.short_run import last_loss, smooth

losses = st.floats(0, 10) | st.sampled_from([math.inf, math.nan])


@given(st.lists(losses, min_size=1, max_size=8), st.floats(0, 1))
def test_the_largest_batch_is_no_worse_than_any_smaller_one_and_none_above_it_is(
    found: list[float], tolerance: float
) -> None:
    by_k = {2**power: loss for power, loss in enumerate(found)}

    def no_worse(k: int) -> bool:
        return math.isfinite(by_k[k]) and all(
            by_k[k] <= by_k[j] + tolerance for j in by_k if j < k and math.isfinite(by_k[j])
        )

    assert largest_no_worse(by_k, tolerance) == max([1, *(k for k in by_k if no_worse(k))])


@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_learning_rate_follows_by_the_papers_rule_of_the_optimizer(k: int) -> None:
    assert lr_factor("auto", SGD(momentum=0.9), k) == lr_factor("linear", AdamW(), k) == k
    assert lr_factor("auto", AdamW(), k) == lr_factor("sqrt", SGD(), k) == math.sqrt(k)
    assert lr_factor("constant", SGD(), k) == 1


@given(st.integers(0, 4), st.integers(0, 900), st.sampled_from([1, 2, 4]))
def test_a_branchs_learning_rate_is_the_runs_at_as_many_samples_times_the_gain(stage: int, at: int, k: int) -> None:
    growth = exponential(4, cap=32)
    trunk = Controller(growth=growth, lr=sqrt_lr(0.3, Cosine()), budget=budget(samples=1000), epoch=100)
    start = replace(Progress().repeat(1, at), stage=stage)
    branch = replace(
        trunk,
        growth=Branch(start=k * growth.stage_batch(stage), trunk=trunk, gain=0.7),
        budget=budget(samples=at + 5000),
    )
    assert branch.advance(start) == start
    assert branch.batch(start) == k * growth.stage_batch(stage)
    assert branch.plan(start).lr == pytest.approx(0.7 * trunk.rate(start, growth.stage_batch(stage)), rel=1e-12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 60), st.integers(0, 2**31))
def test_smoothing_is_the_mean_over_the_samples_of_the_window(batches: list[int], window: int, seed: int) -> None:
    found = np.random.RandomState(seed).rand(len(batches))
    curve = list(zip(np.cumsum(batches).tolist(), found.tolist(), strict=True))
    single = np.repeat(found, batches)
    places = np.arange(1, len(single) + 1)
    wanted = [single[max(0, place - window) : place].mean() for place in places]
    np.testing.assert_allclose(smooth(curve, places.astype(float), window), wanted, rtol=1e-9)


def test_a_branch_with_an_update_that_was_not_finite_has_an_infinite_loss() -> None:
    assert last_loss([(4, 1.0), (8, 2.0), (12, 4.0), (16, 3.0)]) == 3.0
    assert last_loss([(4, 1.0), (8, math.inf)]) == last_loss([]) == math.inf


def trunk(tmp_path: Path, at: int = 0, **settings: Any) -> Trunk:
    config = {"growth": {"kind": "constant", "start": 16}, "budget": {"samples": 4000}, **settings}
    place, progress = tmp_path / "step-00000007", Progress().repeat(16, at)
    return Trunk(folder=RunFolder(tmp_path), run=parse(config), checkpoint=place, progress=progress)


def test_branches_default_to_five_hundred_batches_and_sixteenfold_or_what_fits(tmp_path: Path) -> None:
    assert resolve(ProbeOptions(), trunk(tmp_path), 1437, math.inf) == (8000, [1, 2, 4, 8, 16])
    assert resolve(ProbeOptions(), trunk(tmp_path), 100, math.inf) == (8000, [1, 2, 4])
    assert resolve(ProbeOptions(samples=600), trunk(tmp_path), 1437, math.inf) == (600, [1, 2, 4])
    asked = ProbeOptions(samples=8192, up_to=64)
    assert resolve(asked, trunk(tmp_path), 1437, math.inf) == (8192, [1, 2, 4, 8, 16, 32, 64])
    assert resolve(ProbeOptions(), trunk(tmp_path), 1437, 700) == (700, [1, 2, 4])


@pytest.mark.parametrize(
    ("options", "epoch", "left", "told"),
    [
        (ProbeOptions(up_to=32), 400, math.inf, "--up-to 32: batch 512 exceeds the 400 samples"),
        (ProbeOptions(samples=100, up_to=2), 400, math.inf, "make 3 updates, fewer than 8; give at least 256"),
        (ProbeOptions(samples=100), 400, math.inf, "nothing to compare: twice the batch of 16"),
        (ProbeOptions(), 31, math.inf, "nothing to compare"),
        (ProbeOptions(up_to=70), 1437, math.inf, "--up-to 70: k is 1, 2, 4 …; give 64 or 128"),
        (ProbeOptions(), 1437, 100, "decay ends 100 samples after step-00000007, too few for branches"),
        (ProbeOptions(samples=600), 1437, 599, "decay ends 599 samples after step-00000007; take fewer, or an earlier"),
    ],
)
def test_branches_that_cannot_be_are_refused(
    options: ProbeOptions, epoch: int, left: float, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(options, trunk(tmp_path), epoch, left)


def test_a_run_without_a_decay_can_be_branched_beyond_its_end(tmp_path: Path) -> None:
    plain, decaying = trunk(tmp_path, at=249), trunk(tmp_path, at=249, lr={"decay": {"kind": "cosine"}})
    assert samples_left(plain, plain.run.controller(1)) == math.inf
    assert samples_left(decaying, decaying.run.controller(1)) == 16
    assert plain.batch == constant(16).stage_batch(0)
    assert LR().decay == plain.run.lr.decay


def test_the_figure_is_drawn_whatever_the_branches_came_to(tmp_path: Path) -> None:
    common: dict[str, Any] = {"lr": 0.1, "updates": 3, "evaluations": 9, "seconds": 1.0}
    curve = ((4, 2.0), (8, 1.0), (12, 0.5))
    whole = BranchResult(k=1, batch=4, loss=0.5, test_loss=0.7, curve=curve, **common)
    lost = BranchResult(k=2, batch=8, loss=math.inf, test_loss=math.inf, curve=((8, math.inf),), **common)
    for branches in ([whole, lost], [whole, replace(whole, k=2, batch=8, loss=50.0, test_loss=0.0)], [lost, lost]):
        answers = {"training": 1, "test": 2} if branches[0] is whole else {"training": 2}
        figure(branches, "a_$b", answers, 0.01).savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "title", ["run, step-00000300", "a-run-with-a-name-that-is-long_" * 6 + ", step-00000300", "x" * 300]
)
@pytest.mark.parametrize("first", [4, 65_536])
def test_no_text_of_the_figure_is_cut_off_or_covers_another(title: str, first: int) -> None:
    branches = [
        BranchResult(
            k=k, batch=first * k, lr=0.1, updates=2, loss=1.5, test_loss=2.0, evaluations=9, seconds=1.0,
            curve=((first * k, 2.0), (2 * first * k, 1.0)),
        )
        for k in (1, 2, 4, 8, 16)
    ]  # fmt: skip
    drawn = figure(branches, title, {"training": 4, "test": 1}, 0.0123456)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    drawn_box, (width, height) = drawn.get_tightbbox(canvas.get_renderer()), drawn.get_size_inches()
    assert drawn_box.x0 >= 0 and drawn_box.x1 <= width
    assert drawn_box.y0 >= 0 and drawn_box.y1 <= height
    labels = drawn.axes[1].get_xticklabels()
    if labels[0].get_rotation() == 0:
        boxes = [label.get_window_extent() for label in labels]
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes))
