"""lr.base=auto: the run is that of the number which it finds, every gradient of it is counted, and once is enough."""

import itertools
import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import events
from small_models import Drawing
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from distgrow import Controller, budget, every, fit
from distgrow.config.load import load, parse
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR
from distgrow.core.rate_test import MOST_RATES, RateTest
from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.spec import Torch
from distgrow.growth import Auto, Constant, Exponential
from distgrow.growth.critical_batch import CriticalBatch
from distgrow.optim import SGD, AdamW
from distgrow.optim.groups import ParameterGroup
from distgrow.planning.check import check
from distgrow.planning.table import show
from distgrow.report.runs import read
from distgrow.run.folder import RunFolder
from distgrow.tracking.background import point_of
from distgrow.training.hooks import Hook
from distgrow.training.spec import RunSpec

SHORT = RateTest(updates=20, start=0.1)
AUTO = LR(base="auto", test=SHORT)


class Point(nn.Module):
    """θ, from 1: the loss is 2θ² for every row, so L = 4 and gradient descent is stable below 2/L = 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.other = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return self.theta**2 + self.other**2 + 0 * rows


def bowl(model: nn.Module, batch: Any) -> Tensor:
    return 2.0 * model(batch[0]).mean()


ROWS = [(torch.zeros(1, dtype=torch.float64),) for _ in range(400)]


def classes(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def table(count: int = 240) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    rows = torch.randn(count, 3, generator=made, dtype=torch.float64)
    return [(row, (row.sum() > 0).long()) for row in rows]


class Counted:
    """A loss that counts the rows whose gradient is computed, and may fail at one of them."""

    def __init__(self, loss: Callable[[nn.Module, Any], Tensor], fails_after: int | None = None) -> None:
        self.loss, self.rows, self.fails_after = loss, 0, fails_after

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        found, count = self.loss(model, batch), len(batch[0])

        def counted(gradient: Tensor) -> None:
            del gradient
            self.rows += count

        if self.fails_after is not None and self.rows >= self.fails_after:
            raise RuntimeError("killed")
        if found.requires_grad:
            found.register_hook(counted)
        return found


def trained(folder: Path, lr: LR | None, model: nn.Module | None = None, **changed: Any) -> Any:
    """Return (the result, the parameters and buffers) of a run."""
    model = Drawing() if model is None else model
    given: dict[str, Any] = {"loss": classes, "train": table(), "growth": Exponential(start=8, cap=32)}
    given |= {"stages": every(samples=300)}
    given |= {"budget": budget(samples=960), "optimizer": SGD(momentum=0.5), "run": RunSpec(dir=str(folder))}
    given |= changed
    result = fit(model, given.pop("loss"), given.pop("train"), lr=lr, **given)
    return result, torch.cat([value.double().flatten() for value in model.state_dict().values()])


def choice(folder: Path) -> dict[str, Any]:
    (found,) = events(folder, "lr_choice")
    return found


# ── the choice ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("start", [0.013, 0.1, 0.49, 0.51, 7.0])
def test_the_edge_is_two_over_smoothness_whichever_side_it_is_looked_for_from(tmp_path: Path, start: float) -> None:
    lr = LR(base="auto", test=RateTest(start=start, updates=20))
    trained(tmp_path / "run", lr, Point(), loss=bowl, train=ROWS, optimizer=SGD(), growth=Constant(start=8))
    found = choice(tmp_path / "run")
    assert found["largest_stable"] < 0.5 <= 2 * found["largest_stable"]
    assert found["verdicts"] == ["stable" if lr < 0.5 else "unstable" for lr in found["lrs"]]
    assert found["base"] <= found["largest_stable"] / 2
    assert events(tmp_path / "run", "step")[0]["lr"] == found["base"]


@pytest.mark.parametrize("own", [False, True])
def test_groups_follow_by_their_scale_so_the_edge_is_that_of_the_fastest_one(tmp_path: Path, own: bool) -> None:
    """The rate of `other` is 4η: stable if 4η < 0.5."""
    model, optimizer = Point(), SGD(groups=[ParameterGroup(match="other", lr_scale=4.0)])
    groups = [{"params": [model.theta]}, {"params": [model.other], "lr": 0.4}]
    given: Any = torch.optim.SGD(groups, lr=0.1) if own else optimizer
    lr = LR(base="auto", test=RateTest(updates=20)) if own else AUTO
    trained(tmp_path / "run", lr, model, loss=bowl, train=ROWS, optimizer=given)
    assert choice(tmp_path / "run")["largest_stable"] == 0.1
    assert choice(tmp_path / "run")["lrs"] == [0.1, 0.2]


class Weighing(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]) * self.weight, batch[1])


class Again(IterableDataset[Any]):
    """A stream that begins anew each time."""

    def __iter__(self) -> Iterator[Any]:
        return iter(table())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"growth": Auto(start=8), "stages": None},
        {"loss": Weighing},
        {"optimizer": AdamW(groups=[ParameterGroup(ndim=1, lr_scale=0.5)])},
        {"train": Again},
        {"engine": Torch(delay=2)},
        {"growth": CriticalBatch(start=8, cap=32, smoothness=0.01), "stages": None},
    ],
    ids=["plain", "measuring", "loss with weights", "groups", "stream", "delay", "growth by the rate"],
)
def test_the_run_equals_to_the_bit_the_run_with_that_number(tmp_path: Path, changed: dict[str, Any]) -> None:
    made = {key: value() if isinstance(value, type) else value for key, value in changed.items()}
    again = {key: value() if isinstance(value, type) else value for key, value in changed.items()}
    if "smoothness" in str(changed):
        made["optimizer"] = again["optimizer"] = SGD()
    first, one = trained(tmp_path / "auto", AUTO, **made)
    found = choice(tmp_path / "auto")
    second, other = trained(tmp_path / "given", LR(base=found["base"]), **again)
    assert torch.equal(one, other)
    ledgers = [vars_of(result.progress.ledger) for result in (first, second)]
    assert ledgers[0].pop("probe") == ledgers[1].pop("probe") + found["evaluations"]
    assert ledgers[0] == ledgers[1]
    for key in ("batch", "lr", "loss", "grad_norm"):
        assert [e[key] for e in events(tmp_path / "auto", "step")] == [
            e[key] for e in events(tmp_path / "given", "step")
        ]


def vars_of(ledger: Any) -> dict[str, int]:
    return {name: getattr(ledger, name) for name in ledger.__dataclass_fields__}


class Kept(torch.optim.Optimizer):
    """Gradient descent with a field of its own, as torch's copies of an optimizer lose."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.sign = -1.0

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=self.sign * group["lr"])


def test_an_optimizer_that_is_built_already_begins_at_its_own_rate_and_is_not_touched(tmp_path: Path) -> None:
    def built(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
        own = list(model.parameters())
        return [Kept(own[:2], lr), torch.optim.SGD(own[2:], lr=lr, momentum=0.5)]

    model, other = Drawing(), Drawing()
    lr = LR(base="auto", test=RateTest(updates=20))
    _, one = trained(tmp_path / "auto", lr, model, optimizer=built(model, 0.05))
    found = choice(tmp_path / "auto")
    assert 0.05 in found["lrs"]
    _, two = trained(tmp_path / "given", LR(base=found["base"]), other, optimizer=built(other, found["base"]))
    assert torch.equal(one, two)


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_gradient_is_in_the_ledger(tmp_path: Path) -> None:
    loss = Counted(classes)
    result, _ = trained(tmp_path / "run", AUTO, loss=loss)
    found = choice(tmp_path / "run")
    assert result.progress.ledger.probe == found["evaluations"] == 64 + 20 * 8 * len(found["lrs"])
    assert result.progress.ledger.total == loss.rows
    assert [event["sfo"] for event in events(tmp_path / "run", "end")] == [loss.rows]
    assert sum(trial["evaluations"] for trial in events(tmp_path / "run", "lr_trial")) == found["evaluations"]


def test_the_budget_of_evaluations_pays_for_it(tmp_path: Path) -> None:
    result, _ = trained(tmp_path / "run", AUTO, budget=budget(sfo=4000))
    assert result.progress.ledger.first_time == 4000
    assert result.progress.ledger.applied == 4000 - choice(tmp_path / "run")["evaluations"]


def test_short_runs_are_a_tenth_of_the_budget_at_most_unless_that_is_too_short_to_tell() -> None:
    for total, batch in itertools.product([100, 10_000, 10**6, 10**8], [1, 8, 500]):
        updates = RateTest().length(total, batch)
        assert 20 <= updates <= 200
        assert updates == 20 or MOST_RATES * updates * batch <= 0.1 * total
        assert updates == 200 or MOST_RATES * (updates + 1) * batch > 0.1 * total
    assert RateTest(updates=31).length(100, 8) == 31


# ── once is enough ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_is_killed_before_the_choice_measures_again_and_counts_what_was_lost(tmp_path: Path) -> None:
    whole, expected = trained(tmp_path / "whole", AUTO)
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path / "run", AUTO, loss=Counted(classes, fails_after=64 + 2 * 160 + 40))
    assert [trial["lr"] for trial in events(tmp_path / "run", "lr_trial")] == [0, 0.1, 0.2]
    result, found = trained(tmp_path / "run", AUTO, resume=True)
    assert torch.equal(found, expected)
    ledgers = [vars_of(each.progress.ledger) for each in (result, whole)]
    assert ledgers[0].pop("replayed") == 64 + 2 * 160
    assert ledgers[1].pop("replayed") == 0
    assert ledgers[0] == ledgers[1]


def test_what_a_killed_measurement_has_left_is_gone_after_the_resume(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path / "run", AUTO, loss=Counted(classes, fails_after=64 + 40))
    left = tmp_path / "run" / ".range-test-abc" / "checkpoints"
    left.mkdir(parents=True)  # as SIGKILL leaves it
    (left / "file").touch()
    trained(tmp_path / "run", AUTO, resume=True)
    assert not list((tmp_path / "run").glob(".range-test-*"))


class Killing(Hook):
    """Ends the program where a run would begin."""

    def begin(self, run: Any) -> None:
        raise RuntimeError("killed")


def test_a_run_that_is_killed_between_the_choice_and_its_first_checkpoint_goes_by_the_choice(tmp_path: Path) -> None:
    whole, expected = trained(tmp_path / "whole", AUTO)
    with pytest.raises(ConfigError, match="killed"):
        trained(tmp_path / "run", AUTO, hooks=[Killing()])
    tried = events(tmp_path / "run", "lr_trial")
    loss = Counted(classes)
    result, found = trained(tmp_path / "run", AUTO, resume=None, loss=loss)
    assert torch.equal(found, expected)
    assert events(tmp_path / "run", "lr_trial") == tried
    assert result.progress.ledger == whole.progress.ledger
    assert loss.rows == whole.progress.ledger.applied


class Stopping(Counted):
    """A loss in whose computation this process is asked once to stop."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self.fails_after is not None and self.rows >= self.fails_after:
            self.fails_after = None
            signal.raise_signal(self.signal)
        return super().__call__(model, batch)

    signal = signal.SIGTERM


def test_a_run_that_is_stopped_as_it_measures_ends_in_peace_and_goes_on(tmp_path: Path) -> None:
    whole, expected = trained(tmp_path / "whole", AUTO)
    loss = Stopping(classes, fails_after=64 + 160 + 40)
    stopped, _ = trained(tmp_path / "run", AUTO, loss=loss)
    assert not stopped.finished
    assert stopped.progress.step == 0
    assert loss.rows < 64 + 2 * 160
    result, found = trained(tmp_path / "run", AUTO, resume=True)
    assert torch.equal(found, expected)
    assert result.progress.ledger.probe == whole.progress.ledger.probe


def test_ctrl_c_says_that_nothing_was_trained(tmp_path: Path) -> None:
    loss = Stopping(classes, fails_after=64 + 40)
    loss.signal = signal.SIGINT
    run = RunSpec(dir=str(tmp_path / "run"), stop_signals=["SIGINT"])
    with pytest.raises(KeyboardInterrupt, match="holds no update; go on with resume=True"):
        trained(tmp_path / "run", AUTO, loss=loss, run=run)


def test_a_resume_never_measures_again_and_another_test_changes_nothing(tmp_path: Path) -> None:
    _, expected = trained(tmp_path / "whole", AUTO, budget=budget(samples=1920))
    trained(tmp_path / "run", AUTO)
    loss, later = Counted(classes), LR(base="auto", test=RateTest(updates=33, start=5.0))
    result, found = trained(tmp_path / "run", later, budget=budget(samples=1920), resume=True, loss=loss)
    assert torch.equal(found, expected)
    assert loss.rows == 960
    assert len(events(tmp_path / "run", "lr_choice")) == 1
    assert result.progress.ledger.probe == choice(tmp_path / "run")["evaluations"]


def test_a_number_in_place_of_auto_or_auto_in_place_of_a_number_is_another_config(tmp_path: Path) -> None:
    trained(tmp_path / "auto", AUTO)
    trained(tmp_path / "given", LR(base=0.05))
    with pytest.raises(ConfigError, match=r"lr\.base: 'auto' in the folder, 0\.05 now"):
        trained(tmp_path / "auto", LR(base=0.05), resume=True)
    with pytest.raises(ConfigError, match=r"lr\.base: 0\.05 in the folder, 'auto' now"):
        trained(tmp_path / "given", AUTO, resume=True)
    assert not events(tmp_path / "given", "lr_trial")


def test_the_number_that_was_measured_may_take_the_place_of_auto(tmp_path: Path) -> None:
    """By what the run has printed of it, with four digits; and `auto` may come back."""
    _, expected = trained(tmp_path / "whole", AUTO, budget=budget(samples=1920))
    trained(tmp_path / "run", AUTO)
    number = float(f"{choice(tmp_path / 'run')['base']:.4g}")
    with pytest.raises(ConfigError, match="lr.base: 'auto' in the folder"):
        trained(tmp_path / "run", LR(base=math.nextafter(number, 1)), resume=True)
    loss = Counted(classes)
    result, found = trained(tmp_path / "run", LR(base=number), budget=budget(samples=1440), resume=True, loss=loss)
    assert loss.rows == 480
    assert result.progress.ledger.probe == choice(tmp_path / "run")["evaluations"]
    _, found = trained(tmp_path / "run", AUTO, budget=budget(samples=1920), resume=True)
    assert torch.equal(found, expected)
    assert len(events(tmp_path / "run", "lr_choice")) == 1


def test_what_reads_a_run_reads_the_measured_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"task": {"kind": "digits"}, "model": {"kind": "softmax"}, "growth": {"kind": "constant", "start": 16}}
    config |= {"lr": {"base": "auto", "test": {"updates": 20}}, "budget": {"steps": 40}, "run": {"dir": "one"}}
    parse(config).fit()
    from distgrow.critical_batch.branches import find_checkpoint
    from distgrow.planning.forecast import foresee

    base = choice(tmp_path / "one")["base"]
    assert find_checkpoint("one").run.lr.initial == base
    assert load("one/config.yaml").fit(resume=True).progress.step == 40
    (record,) = read(["one"])
    assert foresee(record) is not None
    assert parse(config).controller().lr.initial == base  # the plan of a run that has measured
    assert len(events(tmp_path / "one", "lr_choice")) == 1


class Keeping:
    """A tracker of a user's own."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, event: Any) -> None:
        self.lines.append(dict(event))

    def close(self) -> None: ...


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_users_tracker_gets_the_measurement_once_before_the_run_begins(tmp_path: Path) -> None:
    first, later = Keeping(), Keeping()
    trained(tmp_path / "run", AUTO, trackers=[first])
    logged = lines(tmp_path / "run")
    begun = [line["event"] for line in logged].index("start")
    assert {"lr_trial", "lr_choice"} == {line["event"] for line in logged[:begun]}
    assert first.lines == logged
    trained(tmp_path / "run", AUTO, budget=budget(samples=1920), resume=True, trackers=[later])
    assert not {"lr_trial", "lr_choice"} & {line["event"] for line in later.lines}


def test_services_get_the_choice_as_one_point_before_the_first_update(tmp_path: Path) -> None:
    trained(tmp_path / "run", AUTO)
    points = [point for line in lines(tmp_path / "run") if (point := point_of(line)) is not None]
    assert [(point.kind, point.step) for point in points[:2]] == [("lr_choice", 0), ("step", 1)]
    assert points[0].figures["base"] == choice(tmp_path / "run")["base"]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────


class Once(IterableDataset[Any]):
    """A stream that cannot go back."""

    def __init__(self) -> None:
        self.rows = iter(table())

    def __iter__(self) -> Iterator[Any]:
        return self.rows


def rising(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss that every step raises: its gradient points up."""
    value = model(batch[0]).mean()
    return value.detach() * 2 - value


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"engine": Async(workers=2)}, "lr.base=auto compares short runs, and with engine.kind=async"),
        ({"train": Once()}, "let its __iter__ begin anew, or give lr.base a number"),
        ({"budget": budget(sfo=1824)}, r"budget.sfo=1824: .* 1824 gradient evaluations; .*lr.test.updates"),
        (
            {"model": Point(), "loss": rising, "train": ROWS},
            "no rate is stable at batch 8 .* lr.test.start lower, and go on with resume=True",
        ),
        ({"growth": Constant(start=500)}, "500"),
    ],
    ids=["async", "stream", "budget", "unstable", "batch"],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trained(tmp_path / "run", AUTO, **changed)


def test_a_mistake_that_can_be_seen_before_leaves_neither_folder_nor_gradients(tmp_path: Path) -> None:
    loss = Counted(lambda model, batch: classes(model, batch) * len(batch[0]))
    with pytest.raises(ConfigError, match="mean"):
        trained(tmp_path / "run", AUTO, loss=loss)
    assert loss.rows == 0
    assert not (tmp_path / "run").exists()


def test_after_no_rate_was_stable_a_resume_with_a_lower_start_goes_on(tmp_path: Path) -> None:
    high = LR(base="auto", test=RateTest(start=2.0**12, updates=20))
    given: dict[str, Any] = {"model": Point(), "loss": bowl, "train": ROWS, "optimizer": SGD()}
    with pytest.raises(ConfigError, match="tried 4, 8, 16, .* 4096"):
        trained(tmp_path / "run", high, **given)
    lost = sum(trial["evaluations"] for trial in events(tmp_path / "run", "lr_trial"))
    result, _ = trained(tmp_path / "run", AUTO, resume=True, **given)
    assert result.finished
    assert result.progress.ledger.replayed == lost


@pytest.mark.parametrize("key", ["test", "measured"])
def test_keys_of_auto_beside_a_number_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lr.{key} is for lr.base=auto, and lr.base=0.1"):
        LR(base=0.1, **{key: RateTest() if key == "test" else 0.2})


def test_a_controller_alone_has_nothing_to_measure_with() -> None:
    with pytest.raises(ConfigError, match=r"lr\.base=auto is not measured yet.*range-test"):
        Controller(growth=Constant(start=8), lr=AUTO, budget=budget(epochs=1), epoch=100)


# ── the plan ────────────────────────────────────────────────────────────────────────────────────────────────────

DIGITS: dict[str, Any] = {
    "task": {"kind": "digits"},
    "growth": {"kind": "exponential", "start": 8, "cap": 64},
    "lr": {"base": "auto"},
    "budget": {"epochs": 8},
}


def test_the_plan_shows_multiples_of_the_rate_and_bounds_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    show(parse(DIGITS), None, 40)
    told = capsys.readouterr().out
    show(parse({**DIGITS, "lr": {"base": 1.0}}), None, 40)
    as_one = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines() if line.split()[0].isdecimal()]
    assert [row for row in rows if len(row) > 8] == [
        line.split() for line in as_one.splitlines() if line.split()[0].isdecimal() and len(line.split()) > 8
    ]
    assert "lr.base=auto: measured before the first update" in told
    assert "11 short runs" in told
    assert "lr.base=auto" not in as_one


def test_growth_by_the_rate_has_no_plan_before_but_may_be_trained() -> None:
    growth = {"kind": "critical_batch", "smoothness": 0.1, "start": 8, "cap": 64}
    run = parse({**DIGITS, "growth": growth})
    with pytest.raises(ConfigError, match=r"growth\.kind=critical_batch decides by the learning rate"):
        run.controller()
    check(run)  # what `train` asks first
    with pytest.raises(ConfigError, match=r"launch\.workers=.*lr\.base=auto"):
        parse({**DIGITS, "growth": growth, "launch": {"workers": {0: 1, 2: 2}}})


def test_the_choice_is_whole_or_not_there(tmp_path: Path) -> None:
    """config.yaml is written anew as a whole: no reader meets half of it."""
    trained(tmp_path / "run", AUTO)
    folder = RunFolder(tmp_path / "run")
    assert not [file for file in folder.path.iterdir() if file.name.startswith((".config", ".range-test"))]
