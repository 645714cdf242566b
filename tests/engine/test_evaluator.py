"""Probes of a run under way: when they are made, what they cost, and that nothing else changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import events, parameters
from test_probes import truth
from torch import nn
from torch.nn import functional as F

from distgrow import SGD, Budget, ConfigError, RunSpec, StepDecay, Torch, budget, fit, sqrt_lr
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.probe_schedule import Probing
from distgrow.data.datasets import Arrays
from distgrow.growth.exponential import Exponential
from distgrow.growth.norm_threshold import NormThreshold
from distgrow.training.result import Result
from distgrow.training.spec import Evaluation

EPOCH = 60
ASKING = NormThreshold(start=4, cap=16, epsilon=0.35, threshold="published", every=7)


def data(rows: int = EPOCH) -> Arrays:
    generator = torch.Generator().manual_seed(0)
    return Arrays(torch.randn(rows, 5, generator=generator), torch.randint(3, (rows,), generator=generator))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(
    folder: Path,
    every_epochs: float | None = None,
    *,
    ask: bool = False,
    until: Budget | None = None,
    curvature: bool = False,
    **more: Any,
) -> Result:
    """A short run of a network with BatchNorm and dropout, momentum and noise statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
    return fit(
        model, loss, data(), test=data(20), growth=ASKING if ask else Exponential(start=4, cap=16),
        lr=sqrt_lr(0.1, StepDecay()), budget=until or budget(epochs=4),
        run=RunSpec(
            dir=str(folder), probe=Probing(every_epochs=every_epochs, curvature=curvature),
            eval=Evaluation(every_epochs=2.0), checkpoint=Checkpointing(every_steps=5, keep=100),
        ),
        **more,
    )  # fmt: skip


def charged(result: Result, folder: Path) -> int:
    """Evaluations of probes, without those that growth by norms takes to try the loss before it begins."""
    return result.progress.ledger.probe - events(folder, "start")[0]["sfo"]


@pytest.mark.parametrize("every_epochs", [1 / EPOCH, 0.25, 1.0])
def test_a_run_with_probes_has_the_same_parameters_and_updates_as_one_without(
    every_epochs: float, tmp_path: Path
) -> None:
    plain, probed = trained(tmp_path / "plain"), trained(tmp_path / "probed", every_epochs)
    assert torch.equal(parameters(tmp_path / "plain"), parameters(tmp_path / "probed"))
    one, other = plain.progress.to_dict(), probed.progress.to_dict()
    assert charged(plain, tmp_path / "plain") == 0
    assert charged(probed, tmp_path / "probed") == EPOCH * len(events(tmp_path / "probed", "probe"))
    for progress in (one, other):
        del progress["ledger"]["probe"], progress["probe_samples"]
    assert one == other


def test_probes_are_made_at_their_places_with_one_at_each_end(tmp_path: Path) -> None:
    trained(tmp_path / "run", 0.5)
    probes, steps = events(tmp_path / "run", "probe"), events(tmp_path / "run", "step")
    ends = [0, *(step["samples"] for step in steps)]
    crossed = [at for before, at in zip(ends, ends[1:], strict=False) if before // 30 < at // 30]
    assert [probe["samples"] for probe in probes] == [0, *crossed]
    assert all(probe["evaluations"] == EPOCH and probe["seconds"] > 0 for probe in probes)
    assert [probe["sfo"] - probe["samples"] for probe in probes] == [EPOCH * (k + 1) for k in range(len(probes))]


def test_a_probe_at_the_end_is_made_where_no_place_is(tmp_path: Path) -> None:
    trained(tmp_path / "run", 3.0)
    assert [probe["samples"] for probe in events(tmp_path / "run", "probe")] == [0, 180, 240]


def test_growth_gets_the_norm_that_it_asks_for_before_it_decides(tmp_path: Path) -> None:
    result = trained(tmp_path / "run", ask=True)
    norms = {probe["step"]: probe["norm"] for probe in events(tmp_path / "run", "probe")}
    grown = {event["step"]: event["stage"] for event in events(tmp_path / "run", "stage")}
    assert charged(result, tmp_path / "run") == EPOCH * len(norms)
    assert result.progress.stage > 0
    stage = 0
    for step in range(7, result.progress.step, 7):
        asked = stage < ASKING.last_stage
        assert (step in norms) == asked
        stage += asked and norms[step] <= 0.35 * (4 / ASKING.stage_batch(stage)) ** 0.5
        assert grown.get(step, stage) == stage
    assert stage == result.progress.stage


def test_probes_that_somebody_else_wishes_do_not_move_growth(tmp_path: Path) -> None:
    alone, watched = trained(tmp_path / "alone", ask=True), trained(tmp_path / "watched", 0.1, ask=True)
    assert torch.equal(parameters(tmp_path / "alone"), parameters(tmp_path / "watched"))
    assert watched.progress.stage == alone.progress.stage > 0
    places = [(probe["samples"]) for probe in events(tmp_path / "watched", "probe")]
    assert len(places) == len(set(places))  # one measurement serves both
    assert charged(watched, tmp_path / "watched") == EPOCH * len(places)


@pytest.mark.parametrize("ask", [False, True])
def test_a_run_that_goes_on_from_any_checkpoint_ends_bit_identical_and_probes_nothing_twice(
    ask: bool, tmp_path: Path
) -> None:
    whole = trained(tmp_path / "whole", 0.15, ask=ask, until=budget(epochs=2))
    kept = sorted((tmp_path / "whole/checkpoints").iterdir())
    for number, checkpoint in enumerate(kept):
        run = tmp_path / f"again{number}"
        shutil.copytree(tmp_path / "whole", run)
        for newer in kept[number + 1 :]:
            shutil.rmtree(run / "checkpoints" / newer.name)
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        written = next(k for k, line in enumerate(lines) if json.loads(line).get("path") == checkpoint.name)
        sfo = json.loads(lines[written])["sfo"]
        (run / "metrics.jsonl").write_text(
            "".join(line for line in lines[:written] if json.loads(line).get("sfo", 0) <= sfo)
        )
        again = trained(run, 0.15, ask=ask, until=budget(epochs=2), resume=True)
        assert again.progress == whole.progress
        assert torch.equal(parameters(run), parameters(tmp_path / "whole"))


def test_curvature_is_told_with_the_critical_batch_that_the_theory_makes_of_it(tmp_path: Path) -> None:
    probe = Probing(every_epochs=1.0, curvature=True, parts=EPOCH, tolerance=1e-6, iterations=500)
    run = RunSpec(dir=str(tmp_path / "run"), probe=probe)
    samples = data()
    samples = Arrays(samples.inputs.double(), samples.labels)
    model = nn.Linear(5, 3)
    result = fit(
        model, loss, samples, growth=Exponential(start=4, cap=16), lr=sqrt_lr(0.1), budget=budget(epochs=2), run=run,
        engine=Torch(precision="float64"), optimizer=SGD(weight_decay=0.1),
    )  # fmt: skip
    probes = events(tmp_path / "run", "probe")
    assert charged(result, tmp_path / "run") == sum(probe["evaluations"] for probe in probes)
    exact, last = truth(model, samples, 0.1), probes[-1]
    grad_sq, trace = exact.mean.square().sum(), exact.covariance.trace()
    along = exact.mean @ exact.hessian @ exact.mean / grad_sq
    assert last["norm"] ** 2 == pytest.approx(float(grad_sq), rel=1e-9)
    assert last["noise_trace"] == pytest.approx(float(trace), rel=1e-9)
    assert last["noise_scale"] == pytest.approx(float(trace / grad_sq), rel=1e-9)
    assert last["curvature"] == pytest.approx(float(along), rel=1e-9)
    assert last["smoothness"] == pytest.approx(float(torch.linalg.eigvalsh(exact.hessian).max()), rel=1e-4)
    noise_curvature = float((exact.hessian @ exact.covariance).trace() / trace)
    assert last["noise_curvature"] == pytest.approx(noise_curvature, abs=4 * last["noise_curvature_error"])
    room = float(grad_sq * (2 - last["lr"] * along))
    critical = 2 * last["lr"] * last["noise_curvature"] * float(trace) / room
    assert last["critical_batch"] == pytest.approx(critical, rel=1e-9)
    assert last["evaluations"] == EPOCH * (6 + 2 * last["smoothness_products"])


def test_probes_count_to_a_budget_of_evaluations(tmp_path: Path) -> None:
    result = trained(tmp_path / "run", 0.5, until=budget(sfo=300))
    assert 300 <= result.progress.ledger.first_time <= 300 + EPOCH  # the last probe comes after the end


def test_probes_go_over_the_data_set_that_is_given_for_them(tmp_path: Path) -> None:
    trained(tmp_path / "run", 1.0, probe=data(7))
    assert {probe["evaluations"] for probe in events(tmp_path / "run", "probe")} == {7}


def test_probes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_epochs"):
        Probing(every_epochs=0.0)
    with pytest.raises(ConfigError, match="less than one sample; raise it to at least 0.0167"):
        trained(tmp_path / "often", 0.001)
    with pytest.raises(ConfigError, match="has 0 samples, fewer than the 1 rank"):
        trained(tmp_path / "empty", 1.0, probe=data(0))
    with pytest.raises(ConfigError, match="has 1 sample, fewer than the 2 ranks"):
        Probing().check(1, 2, EPOCH, None)
    with pytest.raises(ConfigError, match="at least 2 samples: one has no noise"):
        Probing(every_epochs=1.0, curvature=True).check(1, 1, EPOCH, None)
    with pytest.raises(ValueError, match="needs places to be measured at"):
        Probing(curvature=True)


def test_a_budget_of_evaluations_that_the_first_probe_would_use_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"budget.sfo={EPOCH}: the exact .* takes {EPOCH} gradient"):
        trained(tmp_path / "run", 1.0, until=Budget(sfo=EPOCH))
    assert trained(tmp_path / "more", 1.0, until=Budget(sfo=EPOCH + 2)).progress.ledger.applied == 2


def test_probes_leave_a_budget_of_evaluations_some_for_the_update_after_them(tmp_path: Path) -> None:
    result = trained(tmp_path / "run", 0.25, until=Budget(sfo=4 * EPOCH))
    updates_after = [step["samples"] for step in events(tmp_path / "run", "step")]
    *before, _ = events(tmp_path / "run", "probe")  # the last is that of the end
    assert all(probe["samples"] < updates_after[-1] for probe in before)
    assert result.progress.ledger.total - EPOCH <= 4 * EPOCH


def test_a_first_probe_that_turns_out_to_use_up_the_budget_ends_the_run_with_what_it_took(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"before the first update took \d+ gradient evaluations; raise it, or leave"):
        trained(tmp_path / "run", 1.0, until=Budget(sfo=9 * EPOCH), curvature=True)
    (probe,) = events(tmp_path / "run", "probe")
    assert probe["evaluations"] >= 9 * EPOCH
