"""A run goes on with a larger budget: as if it had had it from the start, or under a new plan that is accepted."""

from pathlib import Path

import pytest
import yaml
from conftest import Commands, events, ledger, parameters

from distgrow.checkpoint.export import weights_of

LONGER = "budget={samples: 2100}"
COSINE = "lr.decay={kind: cosine}"


def recorded(run: Path) -> dict[str, object]:
    """The budget that a run's config.yaml records, without the units that it lacks."""
    budget = yaml.safe_load((run / "config.yaml").read_text())["budget"]
    return {unit: amount for unit, amount in budget.items() if amount is not None}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_extended_run_is_bit_identical_to_one_that_had_the_budget_from_the_start(
    distgrow: Commands, workers: int
) -> None:
    first = "budget={samples: 1472}"  # ends with a whole batch
    assert distgrow.train("whole", LONGER, workers=workers).code == 0
    assert distgrow.train("run", first, workers=workers).code == 0
    extended = distgrow.train("run", LONGER, resume=True, workers=workers)
    assert extended.code == 0
    run, whole = distgrow.folder / "run", distgrow.folder / "whole"
    assert (parameters(run) == parameters(whole)).all()
    assert ledger(run) == ledger(whole)
    assert recorded(run) == {"samples": 2100}
    event = events(run, "rebudget")[0]
    assert (event["old"], event["new"], event["changes"]) == ("samples=1472", "samples=2100", [])
    again = distgrow.train("run", LONGER, resume=True, workers=workers)
    assert again.code == 0
    assert len(events(run, "rebudget")) == 1


@pytest.mark.parametrize("module", ["the command", "torchrun"])
def test_a_plan_that_is_cut_to_the_budget_changes_only_if_that_is_accepted(distgrow: Commands, module: str) -> None:
    ranks = {"workers": 2} if module == "torchrun" else {}
    task = (COSINE, *([] if ranks else ["launch.workers=2"]))
    assert distgrow.train("run", "budget={samples: 800}", *task).code == 0
    run = distgrow.folder / "run"
    before = {file: (run / file).read_bytes() for file in ("config.yaml", "metrics.jsonl")}
    refused = distgrow.train("run", "budget={samples: 1600}", *task, resume=True, **ranks)
    assert refused.code == (1 if ranks else 2)  # torchrun itself knows no other
    assert "the learning rate at sample 800, where the run stands, is 0." in refused.err
    assert "give --rebudget" in refused.err
    assert ranks or "Traceback" not in refused.err
    assert {file: (run / file).read_bytes() for file in before} == before

    assert distgrow.train("run", "budget={samples: 1600}", *task, "--rebudget", resume=True, **ranks).code == 0
    assert recorded(run) == {"samples": 1600}
    assert events(run, "rebudget")[0]["changes"]
    assert ledger(run)["applied"] == 1600
    steps = [step for step in events(run, "step") if step["samples"] > 800]
    assert steps[0]["lr"] > 0.04  # half a cosine is left, not its end
    assert steps[-1]["lr"] < 0.002


def test_a_budget_below_what_is_done_is_refused_and_rebudget_needs_a_run(distgrow: Commands) -> None:
    assert distgrow.train("run").code == 0
    below = distgrow.train("run", "budget={samples: 900}", "--rebudget", resume=True)
    assert below.code == 2
    assert "samples=900 is less than run has done already" in below.err
    assert recorded(distgrow.folder / "run") == {"samples": 1500}
    begun = distgrow.train("new", "--rebudget")
    assert begun.code == 2
    assert "--rebudget is for a run that goes on" in begun.err
    assert not (distgrow.folder / "new").exists()


def test_a_last_update_that_the_budget_cut_short_is_said(distgrow: Commands) -> None:
    assert distgrow.train("run").code == 0
    extended = distgrow.train("run", LONGER, "--auto-resume")
    assert extended.code == 0
    assert "the last update was no whole batch, as the budget of samples=1500 ended there" in extended.err


def test_a_run_that_a_hook_has_ended_goes_on_with_a_larger_budget_alone(distgrow: Commands) -> None:
    hooks = ("run.eval.every_samples=100", "run.eval.every_epochs=null", "run.early_stopping={min_delta: 9}")
    assert distgrow.train("run", *hooks).code == 0
    run = distgrow.folder / "run"
    ended = ledger(run)["applied"]
    assert ended < 1500
    assert distgrow.train("run", *hooks, resume=True).code == 0
    assert ledger(run)["applied"] == ended
    assert distgrow.train("run", *hooks, LONGER, resume=True).code == 0
    assert events(run, "rebudget")[0]["voided"]
    assert ledger(run)["applied"] > ended
    further = ledger(run)["applied"]
    assert distgrow.train("run", *hooks, LONGER, resume=True).code == 0  # the second end counts
    assert ledger(run)["applied"] == further


@pytest.mark.parametrize(
    "engine",
    [
        "engine.kind=torch",
        pytest.param("engine.kind=fsdp", marks=pytest.mark.slow),
        pytest.param("engine={kind: deepspeed, zero: 1}", marks=pytest.mark.slow),
        pytest.param("engine={kind: deepspeed, zero: 3}", marks=pytest.mark.slow),
    ],
)
def test_a_run_on_two_ranks_begins_with_the_weights_of_another(distgrow: Commands, engine: str) -> None:
    task = (engine, "optimizer={kind: adamw}")
    assert distgrow.train("first", *task, workers=2).code == 0
    still = ("lr.base=1e-30", "budget={samples: 8}")  # an update that moves nothing
    begun = distgrow.train("second", *task, *still, "init=first", workers=2)
    assert begun.code == 0
    assert "begins with 6 of 6 tensors from first/checkpoints/step-" in begun.err
    first, second = (weights_of(distgrow.folder / name).state for name in ("first", "second"))
    assert all((first[name] == second[name]).all() for name in first)
    assert events(distgrow.folder / "second", "start")[0]["init"]
    narrower = ("model.hidden=[128, 32]", "init={from: first, strict: false}")
    other = distgrow.train("third", *task, *still, *narrower, workers=2)
    assert "left out: 3 of another shape: " in other.err
