"""Runs with branches: the winner's updates are the run's own, the others are charged, verdicts can be checked."""

import json
import math
import os
import signal
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Drawing
from torch import Tensor, nn
from torch.nn import functional as F

from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.average import Tail
from distgrow.core.budget import Budget
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Linear
from distgrow.core.optimizer_plan import AtGrowth
from distgrow.core.stages import Every, Stages
from distgrow.data.datasets import digits
from distgrow.data.spec import Loading
from distgrow.engine.spec import Torch
from distgrow.growth.base import GrowthPolicy
from distgrow.growth.branching import Branching
from distgrow.growth.certified import Certified
from distgrow.growth.constant import Constant
from distgrow.growth.learned import Learned
from distgrow.growth.steps import Steps
from distgrow.optim.adamw import AdamW
from distgrow.optim.sgd import SGD
from distgrow.report.write import write
from distgrow.training.fit import fit
from distgrow.training.hooks import EndRun, Hook, UpdateMade
from distgrow.training.result import Result
from distgrow.training.spec import RunSpec

SAMPLES = 4_000
CERTIFIED = Certified(start=8, cap=64, windows=8, tolerance=0.05, cost=0.4)
NEVER = Certified(start=8, cap=64, windows=8, cost=0.4, tolerance=0, confidence=1e9)
LEARNED = Learned(start=8, cap=64, windows=8, tolerance=0.002, cost=0.4)
BOTH = Certified(start=8, cap=64, windows=8, rates="both", tolerance=0.02, cost=0.4)


class Counted:
    """A data set that counts the rows that are read for training."""

    def __init__(self) -> None:
        self._rows, self.read = digits()[0], 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return self._rows.inputs[index], self._rows.labels[index]


class Bomb:
    """A tracker that ends a run at the n-th event of a kind, as a fault would, before or after it is written."""

    def __init__(self, kind: str, count: int) -> None:
        self._kind, self._left = kind, count

    def log(self, event: Mapping[str, Any]) -> None:
        self._left -= event["event"] == self._kind
        if self._left == 0:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run has left."""

    result: Result
    parameters: Tensor
    events: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(1), batch[1])


def trained(growth: GrowthPolicy, folder: Path, *, train: Any = None, bomb: Any = None, **settings: Any) -> Trained:
    torch.manual_seed(0)
    model = settings.pop("model", None) or nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    train_set, test_set = digits()
    loss, test = settings.pop("loss", cross_entropy), settings.pop("test", test_set)
    run = RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=40), **settings.pop("run", {}))
    result = fit(
        model, loss, train_set if train is None else train, test=test, growth=growth, run=run,
        trackers=[] if bomb is None else [bomb],
        **{"lr": LR(base=0.1), "budget": Budget(samples=SAMPLES), "engine": Torch(max_micro=16), **settings},
    )  # fmt: skip
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parameters = torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])
    return Trained(result=result, parameters=parameters, events=events)


def fixed(run: Trained, growth: Branching) -> tuple[Steps, Stages]:
    """Return the decided schedule of a run as one that is planned."""
    begun = list({event["stage"]: event["samples"] for event in run.of("stage")}.values())
    lengths = [b - a for a, b in zip(begun, begun[1:], strict=False)]
    return Steps(batches=[8 * 2**k for k in range(len(begun))]), Stages(every=Every(samples=lengths))


def noisy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0].flatten(1)[:, :3].double()), batch[1] % 2)


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum, decay": {"optimizer": SGD(momentum=0.9), "lr": LR(base=0.02, decay=WSD(decay=0.5))},
    "adamw, average from within a test on": {
        "optimizer": AdamW(at_growth=AtGrowth(moments="reset")), "lr": LR(base=0.003, rule=Linear()),
        "average": Tail(fraction=0.92),
    },
    "batch norm and dropout": {"loss": noisy},
    "delay": {"engine": Torch(max_micro=16, delay=2), "lr": LR(base=0.03)},
    "loader processes": {"run": {"loader": Loading(workers=1)}},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_to_the_bit_that_of_its_decided_schedule_given_beforehand(name: str, tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        own = {"model": Drawing()} if name == "batch norm and dropout" else {}
        return {**SETTINGS[name], **own}

    run = trained(CERTIFIED, tmp_path / "run", **settings())
    winners = [event["winner"] for event in run.of("branches")]
    assert 1 in winners
    growth, lengths = fixed(run, CERTIFIED)
    given = trained(growth, tmp_path / "given", stages=lengths, **settings())
    assert torch.equal(run.parameters, given.parameters)
    keys = ("step", "samples", "batch", "lr", "loss", "grad_norm", "stage", "sfo_applied")
    assert [[step[key] for key in keys] for step in run.of("step")] == [
        [step[key] for key in keys] for step in given.of("step")
    ]
    assert run.result.progress.ledger.applied == given.result.progress.ledger.applied
    if "average" in SETTINGS[name]:
        assert run.result.metrics["average/loss"] == given.result.metrics["average/loss"]


@pytest.mark.parametrize("growth", [CERTIFIED, BOTH, LEARNED])
def test_probe_is_what_the_branches_that_do_not_go_on_evaluated_and_the_log_grows(
    growth: Branching, tmp_path: Path
) -> None:
    rows = Counted()
    run = trained(growth, tmp_path / "run", train=rows)
    before = rows.read
    tests, ledger = run.of("branches"), run.result.progress.ledger
    assert len(tests) > 2
    assert ledger.probe == sum(len(test["losses"][0]) * test["window"] * (len(test["batches"]) - 1) for test in tests)
    assert ledger.probe == sum(test["evaluations"] for test in tests)
    assert ledger.applied == SAMPLES
    read = Counted()
    trained(Constant(start=8), tmp_path / "constant", train=read)
    assert before - read.read == ledger.probe  # rows of the checks before a run cancel
    assert run.events[-1]["sfo"] == ledger.total
    told = [event["sfo"] for event in run.events if event["event"] != "checkpoint"]  # they are written later
    assert told == sorted(told)
    assert ledger.probe <= growth.cost * SAMPLES


@pytest.mark.parametrize("growth", [BOTH, LEARNED])
def test_every_verdict_follows_from_the_numbers_of_its_event(growth: Branching, tmp_path: Path) -> None:
    tests = trained(growth, tmp_path / "run").of("branches")
    assert {test["winner"] for test in tests} > {0} or len(tests) > 2
    for test in tests:
        assert test["batch"] == test["batches"][test["winner"]]
        if test["goes_by"] == "validation":
            best = min(test["validation"])
            passing = [k for k, loss in enumerate(test["validation"]) if loss <= best + test["tolerance"]]
            assert test["winner"] == max(passing)
            continue
        passing = [0]
        for k in range(1, len(test["batches"])):
            differences = [b - a for a, b in zip(*(test["losses"][n][test["skip"] :] for n in (0, k)), strict=True)]
            mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
            assert (test["differences"][k], test["errors"][k]) == (pytest.approx(mean), pytest.approx(error))
            passing += [k] * (mean + test["confidence"] * error <= test["tolerance"])
        assert test["winner"] == max(passing)


def test_the_losses_of_windows_are_those_of_the_winners_updates(wholes: dict[str, Trained]) -> None:
    run = wholes["certified"]
    for test in run.of("branches"):
        won = test["losses"][test["winner"]]
        for window, loss in enumerate(won):
            first = test["samples"] + window * test["window"]
            within = [s for s in run.of("step") if first < s["samples"] <= first + test["window"]]
            assert sum(s["batch"] for s in within) == test["window"]
            assert sum(s["loss"] * s["batch"] for s in within) / test["window"] == pytest.approx(loss)


#: Where a run is cut off: the kind of an event, and which one of its kind.
FAULTS = {
    "before a test": ("step", 35),
    "within a test": ("branch", 2),
    "as a test is told": ("branches", 2),
    "as the winner is told": ("step", 48),
    "after tests": ("step", 130),
}


class Ends(Hook):
    """A hook that ends the run after an update."""

    def __init__(self, step: int) -> None:
        self._step = step

    def after_update(self, update: UpdateMade) -> EndRun | None:
        return EndRun("enough") if update.step == self._step else None


def test_a_hook_that_ends_the_run_before_a_test_spares_it(wholes: dict[str, Trained], tmp_path: Path) -> None:
    begin = wholes["certified"].of("branches")[0]["step"]
    for step, last in ((begin - 1, begin), (begin, begin)):
        run = trained(CERTIFIED, tmp_path / str(step), hooks=[Ends(step)])
        assert (run.result.progress.step, run.result.reason) == (last, "enough")
        assert not run.of("branches") and not run.result.progress.ledger.probe


def test_an_evaluation_that_falls_into_a_branch_is_made_where_it_ends(tmp_path: Path) -> None:
    run = trained(CERTIFIED, tmp_path / "run", run={"eval": {"every_samples": 10}})
    tests = [(event["samples"], event["window"] * CERTIFIED.windows) for event in run.of("branches")]
    evaluated = {event["samples"] for event in run.of("eval")}
    assert tests and all(begin + length in evaluated for begin, length in tests)


def test_the_report_shows_where_branches_were_compared(wholes: dict[str, Trained], tmp_path: Path) -> None:
    folders = [str(run.result.dir) for run in wholes.values()]
    write(folders, str(tmp_path))
    assert "branches compared" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Runs that nothing cuts off."""
    folder = tmp_path_factory.mktemp("wholes")
    return {growth.name: trained(growth, folder / growth.name) for growth in (CERTIFIED, LEARNED)}


@pytest.mark.parametrize(
    ("growth", "where"), [*((CERTIFIED, where) for where in FAULTS), (LEARNED, "within a test")]
)  # fmt: skip
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    growth: Branching, where: str, wholes: dict[str, Trained], tmp_path: Path
) -> None:
    whole = wholes[growth.name]
    with pytest.raises(KeyboardInterrupt):
        trained(growth, tmp_path / "cut", bomb=Bomb(*FAULTS[where]))
    cut = trained(growth, tmp_path / "cut", resume=True)
    assert torch.equal(whole.parameters, cut.parameters)
    ends = [
        replace(run.result.progress, ledger=replace(run.result.progress.ledger, replayed=0)) for run in (whole, cut)
    ]
    assert ends[0] == ends[1]
    assert cut.result.progress.ledger.replayed > 0
    assert not (tmp_path / "cut/.branches").exists()


def test_evaluations_of_a_branch_that_a_fault_took_are_replayed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(CERTIFIED, tmp_path / "cut", bomb=Bomb("branch", 1))
    cut = trained(CERTIFIED, tmp_path / "cut", resume=True)
    branch, resumed = cut.of("branch")[0], cut.of("resume")[0]
    assert branch["evaluations"] == 8 * 8 * 2
    assert resumed["sfo_replayed"] == branch["sfo"] - resumed["samples"]


def test_a_request_to_stop_within_a_test_discards_it_and_the_resumed_run_is_the_same(
    wholes: dict[str, Trained], tmp_path: Path
) -> None:
    whole = wholes["certified"]

    class Stopping:
        def log(self, event: Mapping[str, Any]) -> None:
            if event["event"] == "branch":
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self) -> None:
            pass

    cut = trained(CERTIFIED, tmp_path / "cut", bomb=Stopping())
    assert not cut.result.finished
    stopped = cut.result.progress.ledger
    assert stopped.probe == 0
    assert stopped.discarded >= 8 * 8 * 2
    again = trained(CERTIFIED, tmp_path / "cut", resume=True)
    assert torch.equal(whole.parameters, again.parameters)
    assert replace(again.result.progress.ledger, discarded=0) == whole.result.progress.ledger
    assert again.result.progress.ledger.discarded == stopped.discarded


def test_limits_that_nothing_or_everything_passes_hold_the_batch_or_always_grow_it(
    tmp_path: Path,
) -> None:
    never = trained(NEVER, tmp_path / "never")
    constant = trained(Constant(start=8), tmp_path / "constant")
    assert torch.equal(never.parameters, constant.parameters)
    assert never.result.progress.ledger.probe > 0
    always = trained(Certified(start=8, cap=64, windows=8, cost=0.4, tolerance=1e9), tmp_path / "always")
    stages = [event["batch"] for event in always.of("branches")]
    assert stages == [16, 32, 64][: len(stages)]
    assert always.result.progress.stage == len(stages)


def hits(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).double().mean()


def test_learning_needs_a_test_set_and_its_metric(wholes: dict[str, Trained], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none: give test="):
        trained(LEARNED, tmp_path / "none", test=None)
    sets = {"one": digits()[1], "other": digits()[1]}
    with pytest.raises(ConfigError, match="the test sets are one, other; name one"):
        trained(LEARNED, tmp_path / "several", test=sets)
    named = LEARNED.model_copy(update={"validation": "other"})
    run = trained(named, tmp_path / "named", test=sets)
    assert torch.equal(run.parameters, wholes["learned"].parameters)
    by_accuracy = LEARNED.model_copy(update={"metric": "accuracy", "mode": "max"})
    with pytest.raises(ConfigError, match="growth.metric=accuracy: the task has no metrics but loss"):
        trained(by_accuracy, tmp_path / "bare")
    with pytest.raises(ConfigError, match="growth.metric=accuracy: task.metrics returns share; choose one of them"):
        trained(by_accuracy, tmp_path / "other", metrics=lambda model, batch: {"share": hits(model, batch)})
    assert not (tmp_path / "other").exists()  # refused before the run has begun
    run = trained(by_accuracy, tmp_path / "known", metrics=lambda model, batch: {"accuracy": hits(model, batch)})
    for test in run.of("branches"):
        best, first = max(test["validation"]), test["validation"][0]
        assert test["validation"][test["winner"]] >= best - test["tolerance"]
        assert test["greatest"] == 1 and test["differences"] == [value - first for value in test["validation"]]


def test_a_stream_cannot_go_back_and_is_refused(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            rows = digits()[0]
            yield from zip(rows.inputs, rows.labels, strict=True)

    with pytest.raises(ConfigError, match="give a map-style data set"):
        trained(CERTIFIED, tmp_path / "run", train=Endless())


@pytest.mark.parametrize("growth", [CERTIFIED, NEVER], ids=["grows", "stays"])
def test_memory_that_does_not_hold_a_branch_is_told_once_and_the_run_goes_on_in_smaller_micro_batches(
    growth: Branching, tmp_path: Path
) -> None:
    def narrow(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) > 8 and model.training and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return cross_entropy(model, batch)

    run = trained(growth, tmp_path / "run", loss=narrow)
    small = trained(growth, tmp_path / "small", engine=Torch(max_micro=8))
    assert torch.equal(run.parameters, small.parameters)
    assert len(run.of("oom")) == 1
    for key in ("step", "samples", "sfo"):
        values = [event[key] for event in run.events if event["event"] != "checkpoint"]  # told once it is written
        assert values == sorted(values), key
    assert run.result.progress.ledger == replace(small.result.progress.ledger, discarded=16)
    assert run.result.progress.micro_limit == 8


def test_a_branch_that_is_not_finite_does_not_go_on_and_its_evaluations_are_charged(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * (math.nan if len(batch[0]) > 8 and torch.is_grad_enabled() else 1)

    run = trained(CERTIFIED, tmp_path / "run", loss=broken)
    constant = trained(Constant(start=8), tmp_path / "constant")
    assert torch.equal(run.parameters, constant.parameters)
    assert {test["winner"] for test in run.of("branches")} == {0}
    assert all(test["losses"][1] == [None] * 8 for test in run.of("branches"))
    ledger = run.result.progress.ledger
    assert (ledger.applied, ledger.skipped) == (SAMPLES, 0)
    assert ledger.probe == sum(8 * test["window"] for test in run.of("branches")) > 0
