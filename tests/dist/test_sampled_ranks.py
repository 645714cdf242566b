"""Sampled updates over several ranks: the same parameters and ledger, whoever draws, and after a kill and a resume."""

import pytest
from conftest import Commands, deadly, events, ledger, parameters, wounded

STRATIFIED = ("sampling={kind: stratified, parts: 4}", "engine.precision=float64")


def test_two_ranks_draw_what_one_draws(distgrow: Commands) -> None:
    assert distgrow.train("one", *STRATIFIED).code == 0
    assert distgrow.train("two", *STRATIFIED, "engine.max_micro=3", "run.loader.workers=1", workers=2).code == 0
    one, two = parameters(distgrow.folder / "one"), parameters(distgrow.folder / "two")
    assert (one - two).norm() <= 1e-10 * one.norm()
    assert ledger(distgrow.folder / "one") == ledger(distgrow.folder / "two")
    assert ledger(distgrow.folder / "one")["applied"] == 1500
    assert distgrow.train("shuffled", "engine.precision=float64").code == 0
    shuffled = parameters(distgrow.folder / "shuffled")
    assert (one - shuffled).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("kind", ["nice", "{kind: partition, parts: [400, 500, 537]}"])
def test_a_killed_run_of_two_ranks_is_resumed_by_one_as_if_it_had_not_been(kind: str, distgrow: Commands) -> None:
    sampling = f"sampling={kind if '{' in kind else '{kind: nice}'}"
    settings = (sampling, "engine.precision=float64", "run.checkpoint.every_steps=10")
    commands = wounded(distgrow)
    task = deadly("in forward", commands.folder / "mark")
    assert commands.train("killed", *task, *settings, workers=2).code != 0
    assert commands.train("killed", *task, *settings, resume=True).code == 0
    assert commands.train("whole", *task, *settings).code == 0  # the fault has happened
    one, other = parameters(commands.folder / "whole"), parameters(commands.folder / "killed")
    assert (one - other).norm() <= 1e-10 * one.norm()
    assert ledger(commands.folder / "killed")["applied"] == 1500
    assert ledger(commands.folder / "killed")["replayed"] > 0
    assert {step["world"] for step in events(commands.folder / "killed", "step")} == {1, 2}


def test_growth_to_the_best_batch_of_a_finite_sum_is_the_same_on_two_ranks(distgrow: Commands) -> None:
    constants = "smoothness: 1.0, largest_smoothness: 20.0, mu: 0.1, epsilon: 1.0"
    growth = f"growth={{kind: tau_adaptive, start: 8, cap: 64, min_stage: {{updates: 5}}, {constants}}}"
    settings = (growth, "stages={}", "sampling={kind: nice}", "engine.precision=float64", "engine.max_micro=4")
    assert distgrow.train("one", *settings).code == 0
    assert distgrow.train("two", *settings, workers=2).code == 0
    one, two = (
        [(step["stage"], step["batch"]) for step in events(distgrow.folder / run, "step")] for run in ("one", "two")
    )
    assert one == two
    assert one[-1][0] > 0
    first, second = parameters(distgrow.folder / "one"), parameters(distgrow.folder / "two")
    assert (first - second).norm() <= 1e-10 * first.norm()
