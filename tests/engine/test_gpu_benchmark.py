"""The benchmark of one GPU: its model has the size that it claims, figures follow from rows, and a CPU runs it."""

import gpu
import pytest
import torch
from loops import LENGTH, build
from overhead import Overhead
from paired import Spread

from distgrow.distributed.world import World

EVEN = Spread(low=1.0, median=1.0, high=1.0)


def test_the_gpt_has_thirty_million_parameters() -> None:
    task = build("gpt")
    assert sum(parameter.numel() for parameter in task.model.parameters()) == pytest.approx(30e6, rel=0.05)
    assert task.train[0][0].shape == (LENGTH,)


def test_tokens_per_second_follow_from_the_seconds_of_an_update() -> None:
    row = Overhead(
        model="gpt", engine="torch", world=1, micro=4, accum=2, bare_us=1.0, distgrow_us=500.0, over_bare=EVEN,
        over_logging=EVEN, limit=1.02,
    )  # fmt: skip
    found = gpu.speed(row, build("gpt", small=True), World(device=torch.device("cpu")))
    assert found.tokens_per_s == pytest.approx(4 * 2 * 16 / 500e-6)
    assert found.mfu is None


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu_and_fills_every_table() -> None:
    found = gpu.measure("cpu", quick=True, compiled=False)
    assert [row.model for row in found.overheads] == ["cnn", "cnn", "resnet18", "resnet18", "gpt"]
    growing, constant = found.paper
    assert growing.evaluations == constant.evaluations
    assert growing.updates < constant.updates
    assert all(report.rows and len(report.columns) == len(report.rows[0]) for report in gpu.reports(found))
