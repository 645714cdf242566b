"""What `distgrow plan` tells by the theory, where its constants are given, is what update by update comes out."""

import re
from pathlib import Path

import pytest

from distgrow.config.load import load
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Outcome, Progress
from distgrow.planning import check, forecast, table

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"


def run_of(*overrides: str) -> Run:
    """The digits' config with overrides."""
    return load(DIGITS, ["lr.base=0.1", *overrides])


def number(text: str) -> int:
    return int(text.replace(",", ""))


def theory(smoothness: float, epsilon: float) -> str:
    return f"theory={{smoothness: {smoothness}, variance: 3.0, gap: 2.0, epsilon: {epsilon}}}"


def first_small_enough(run: Run, epsilon: float) -> int | None:
    """SFO of the first update whose bound for L = 2 is at most ε², walked update by update; None: there is none."""
    control, progress = run.controller(1), Progress()
    lr_sum = noise = highest = 0.0
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        lr_sum, noise, highest = lr_sum + plan.lr, noise + plan.lr**2 / plan.batch, max(highest, plan.lr)
        progress = progress.after(plan, Outcome())
        if (2 * 2.0 + 2.0 * 3.0 * noise) / ((2 - 2.0 * highest) * lr_sum) <= epsilon**2:
            return progress.ledger.total
    return None


@pytest.mark.parametrize("epsilon", [0.2, 0.25, 0.4])
def test_the_predicted_sfo_is_that_of_the_first_update_whose_bound_is_small_enough(
    epsilon: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(theory(2.0, epsilon))
    assert table.show(run, 1, rows=20)
    predicted = f"predicted SFO to ‖∇f‖ ≤ {epsilon:g}: {first_small_enough(run, epsilon):,} ("
    assert predicted in capsys.readouterr().out


@pytest.mark.parametrize(
    ("decay", "epsilon"),
    [
        ("{kind: cosine}", 0.25),
        ("{kind: cosine, warmup: 0.5}", 0.25),
        ("{kind: cosine, warmup: 0.1}", 0.16),
        ("{kind: wsd, decay: 0.9}", 0.25),
        ("{kind: step, every: {epochs: 2}}", 0.3),
        ("{kind: step, every: {epochs: 0.1}}", 0.25),
    ],
)
def test_it_goes_by_the_learning_rates_along_the_stages(decay: str, epsilon: float) -> None:
    run = run_of(theory(2.0, epsilon), f"lr.decay={decay}", "growth={kind: constant, start: 16}", "stages={}")
    expected, given = first_small_enough(run, epsilon), run.applicable_theory()
    assert given is not None
    found = forecast.sfo_to_target(given.constants(), run.controller(1), epsilon)
    assert found == (None if expected is None else pytest.approx(expected, rel=0.01))


@pytest.mark.parametrize("optimizer", ["{kind: adamw}", "{kind: sgd, momentum: 0.9}"])
def test_nothing_is_predicted_for_an_optimizer_that_the_bound_is_not_of(
    optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table.show(run_of(theory(10.0, 0.25), f"optimizer={optimizer}"), 1, rows=20)
    told = capsys.readouterr().out
    assert "predicted SFO" not in told
    assert "nothing is predicted for this optimizer" in told


@pytest.mark.parametrize("epsilon", [1e-200, 1e-100, 1e200])
def test_constants_beyond_all_numbers_are_told_and_do_no_harm(
    epsilon: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table.show(run_of(theory(2.0, epsilon)), 1, rows=20)
    assert "nothing is predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ("growth={kind: constant, start: 16}", "lr={base: 3.0, decay: {kind: cosine, warmup: 0.5}}"),
            "lr=3 of stage 0",
        ),
        (("growth={kind: adascale, scale: 16}", "lr={base: 0.5}"), "lr=8 of stage 0, by what may be measured,"),
    ],
)
def test_a_learning_rate_that_gets_there_within_a_stage_is_told_too(
    overrides: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(theory(2.0, 0.1), "stages={}", *overrides)
    assert not table.show(run, 1, rows=20)
    assert f"{told} reaches 2/L=1;" in capsys.readouterr().err
    check.check(run, 1)
    assert told in capsys.readouterr().err


def test_the_highest_learning_rate_of_a_stage_is_shown_between_its_ends(capsys: pytest.CaptureFixture[str]) -> None:
    decay = "lr={base: 0.1, decay: {kind: wsd, warmup: 0.5}}"
    assert table.show(run_of("growth={kind: constant, start: 16}", "stages={}", decay), 1, rows=20)
    first, highest, last = re.findall(r"(\S+) – (\S+) – (\S+)  ", capsys.readouterr().out)[0]
    assert float(first) < 0.01
    assert float(highest) == 0.1
    assert float(last) < 0.01


def test_the_best_constant_batch_beside_it_is_the_best_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.show(run_of(theory(2.0, 0.25)), 1, rows=20)
    constants = [
        (b * c1 * b / (0.25**2 * b - c2), b)
        for c1, c2 in [(2 * 2.0 / ((2 - 0.2) * 0.1), 2 * 0.1 * 3 / (2 - 0.2))]
        for b in (k / 100 for k in range(540, 4000))
    ]
    least, best = min(constants)
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.findall(r"b\* = ([\d,.]+), ([\d,]+) gradient evaluations", line)[0]
    assert float(found[0]) == pytest.approx(best, abs=0.06)
    assert number(found[1]) == pytest.approx(least, rel=1e-3)


def test_a_learning_rate_that_reaches_2_over_l_is_an_error_of_the_plan_and_a_warning_of_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of(theory(10.0, 0.1))
    assert not table.show(run, 1, rows=20)
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1:5] for line in told] == [
        ["lr=0.2", "of", "stage", "2"], ["lr=0.2828", "of", "stage", "3"], ["lr=0.4", "of", "stage", "4"]
    ]  # fmt: skip
    check.check(run, 1)
    assert capsys.readouterr().err.startswith("warning: lr=0.2 of stage 2 reaches 2/L=0.2")
    with pytest.raises(ConfigError, match="batch=16 is smaller than world=17"):
        check.check(run, 17)
