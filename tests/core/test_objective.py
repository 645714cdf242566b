"""growth.objective decides the batches of least time, by brute force, and nothing else than the same numbers would."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scripted import Script

from distgrow import auto, late, matched, objective
from distgrow.config.load import parse
from distgrow.config.run import Run
from distgrow.core.counted import shown
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR
from distgrow.core.pace import Pace, cost
from distgrow.core.progress import Progress
from distgrow.growth import Growth
from distgrow.growth.base import AIMED
from distgrow.growth.objective import Aimed, Objective
from distgrow.planning.check import problems
from distgrow.planning.cost import as_objective, stretches
from distgrow.planning.cost_table import by_stage, checked_price, constant_batches
from distgrow.planning.table import show
from distgrow.planning.what_if.candidates import Setting

latencies, rates, scales = st.floats(1e-3, 10), st.floats(10, 1e4), st.floats(10, 1e5)
AIM = {"workers": 8, "noise": 400, "latency_s": 0.0121, "samples_per_s": 2500}


def seconds(aim: Objective, batch: int, scale: float) -> float:
    """Of the progress of one update without noise, each update taken as it is: whole rows on every worker."""
    return (aim.latency_s + math.ceil(batch / aim.workers) / aim.samples_per_s) * (1 + scale / batch)


# ── what is decided ─────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 64), latencies, rates, scales)
def test_every_batch_from_start_to_cap_takes_an_eighth_more_than_the_fastest_at_most(
    workers: int, latency: float, rate: float, scale: float
) -> None:
    aim = objective(workers, scale, latency, rate)
    best = math.sqrt(latency * workers * rate * scale)
    assume(16 * workers < best < 2e5 * workers)  # else a row for each worker decides
    grid = {max(1, round(best / workers * 1.02**k)) * workers for k in range(-200, 201)}
    least = min(seconds(aim, batch, scale) for batch in grid)
    start, cap = aim.decided().values()
    assert start % workers == 0
    assert cap == 4 * start
    slack = 1 + 8 * workers / best  # of whole rows
    for batch in {start, cap, *(batch for batch in grid if start <= batch <= cap)}:
        assert seconds(aim, batch, scale) <= 1.125 * least * slack


def test_the_eighth_is_met_where_half_of_an_update_is_latency_at_the_noise_scale_itself() -> None:
    aim = objective(1, 400, 4.0, 100)  # n½ = B = b* = 400
    times = [seconds(aim, batch, 400) / seconds(aim, 400, 400) for batch in (*aim.decided().values(), 100, 1600)]
    assert times == pytest.approx([1.125, 1.125, 1.5625, 1.5625])


@given(latencies, rates, scales, st.floats(1, 100))
def test_two_noise_scales_decide_a_batch_each(latency: float, rate: float, scale: float, times: float) -> None:
    aim = objective(1, scale, latency, rate, noise_at_end=times * scale)
    start, cap = aim.decided().values()
    first, last = (math.sqrt(latency * rate * each) for each in (scale, times * scale))
    assert abs(start - first) <= 0.5 or start == 1
    assert cap % start == 0
    assert abs(cap - last) <= start / 2 + 1e-9 or cap == start


@given(st.integers(1, 64), latencies, rates, scales, st.integers(64, 5000))
def test_no_batch_is_above_the_most_and_none_has_fewer_rows_than_workers(
    workers: int, latency: float, rate: float, scale: float, most: int
) -> None:
    start, cap = objective(workers, scale, latency, rate, most=most).decided().values()
    assert workers <= start <= cap <= most
    assert start <= max(workers, most / 4)
    free = objective(workers, scale, latency, rate).decided()
    if free["cap"] <= most and free["start"] <= most / 4:
        assert {"start": start, "cap": cap} == free


# ── the policy that follows ─────────────────────────────────────────────────────────────────────────────────────


def run_of(growth: dict[str, Any], **settings: Any) -> Run:
    return parse({"growth": growth, "lr": {"base": 0.1}, "budget": {"epochs": 20}, **settings})


@pytest.mark.parametrize("kind", ["auto", "late", "matched"])
def test_updates_are_those_of_the_numbers_given_by_hand(kind: str) -> None:
    aimed = run_of({"kind": kind, "objective": AIM})
    by_hand = run_of({"kind": kind, "start": 152, "cap": 608})
    for soonest in (False, True):
        outlines = [list(run.controller(8).outline(Progress(), soonest=soonest)) for run in (aimed, by_hand)]
        assert outlines[0] == outlines[1]
    recorded = aimed.model_dump(mode="json")["growth"]
    assert (recorded["start"], recorded["cap"]) == (152, 608)
    assert run_of(recorded) == aimed  # as from a run's config.yaml


def kinds() -> list[str]:
    return [spec.model_fields["kind"].default for spec in Growth.__args__[0].__args__]  # pyright: ignore


def test_kinds_that_take_an_objective_are_those_that_messages_name() -> None:
    takes = {spec.model_fields["kind"].default for spec in Growth.__args__[0].__args__ if issubclass(spec, Aimed)}  # pyright: ignore
    assert takes == set(re.findall(r"\w+", AIMED)) - {"or"}


@pytest.mark.parametrize("kind", sorted(set(kinds()) - set(re.findall(r"\w+", AIMED))))
def test_other_kinds_refuse_an_objective_by_name(kind: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_of({"kind": kind, "objective": AIM})
    assert f"growth: objective does not go with growth.kind={kind}: " in (told := str(refused.value))
    assert f"of {AIMED}; use one of these kinds, or leave objective out" in told
    assert not set("{}'") & set(told), "a Python value"


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"start": 16}, r"growth: start=16 and objective, which makes start 152, decide the same: remove one"),
        ({"cap": 512}, r"growth: cap=512 and objective, which makes cap 608, decide the same: remove one"),
        ({"objective": {**AIM, "most": 4}}, r"growth\.objective: most=4 is below workers=8.*: raise most, or lower"),
        ({"objective": {**AIM, "noise_at_end": 9}}, r"growth\.objective: noise_at_end=9 is below noise=400.*alone"),
        ({"objective": {**AIM, "noise": -1}}, r"growth\.objective\.noise=-1: must be greater than 0"),
        ({"objective": {**AIM, "latency_s": 0}}, r"growth\.objective\.latency_s=0: must be greater than 0"),
        ({"objective": {"workers": 8}}, r"growth\.objective\.noise: is missing; add it"),
        ({"objective": {**AIM, "wrokers": 8}}, r"growth\.objective\.wrokers: unknown key; did you mean 'workers'"),
        ({"objective": 8}, r"growth\.objective=8: must be a mapping"),
        ({"objective": "time"}, r"growth\.objective='time': must be a mapping; .* with the keys workers, noise"),
        *(
            (
                {"objective": {**AIM, key: number}},
                r"growth\.objective: noise=.*makes b\* = .*: give latency_s in seconds",
            )
            for key, number in [("noise", 1e300), ("noise", 1e-300), ("samples_per_s", 1e308), ("latency_s", 1e-300)]
        ),
        ({"objective": {**AIM, "noise_at_end": 1e300}}, r"growth\.objective: noise_at_end=1e\+300 makes b\* ="),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(growth: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of({"kind": "auto", "objective": AIM, **growth})


@pytest.mark.parametrize(
    ("kind", "given", "key"),
    [
        ("auto", {"noise": 1e9}, "most"),
        ("matched", {"noise_at_end": 1e9}, "most"),
        ("exponential", {"workers": 2000}, "workers"),
    ],
)
def test_a_batch_above_the_training_set_names_what_decided_it_and_the_way_out_helps(
    kind: str, given: dict[str, Any], key: str
) -> None:
    aim = {**AIM, **given}
    found = problems(run := run_of({"kind": kind, "objective": aim}), run.controller(1))
    assert found
    assert all(f"set growth.objective.{key} to at most 1437" in each for each in found)
    helped = run_of({"kind": kind, "objective": {**aim, key: 1437, "most": 1437}})
    assert problems(helped, helped.controller(1)) == []


@given(st.integers(1, 64), scales, st.integers(0, 300))
@example(8, 400, 0)  # start 8, cap 8
@example(8, 400, 8)  # start 8, cap 16
@example(8, 1e-2, 8)  # no more would grow without most, either
def test_a_most_that_lets_no_batch_grow_is_told_with_the_way_out_and_that_helps(
    workers: int, scale: float, more: int
) -> None:
    aim = objective(workers, scale, 0.0121, 2500, most=workers + more)
    start, cap = aim.decided().values()
    free = objective(workers, scale, 0.0121, 2500).decided()
    found = re.search(r"the batch never grows: raise most to (\d+) or more, or lower workers", aim.sentence())
    assert (found is not None) == (start == cap and free["cap"] > free["start"])
    if found is not None:
        helped = aim.model_copy(update={"most": int(found[1])}).decided()
        assert helped["cap"] > helped["start"]


def test_what_if_takes_an_objective_in_place_of_the_runs_first_batch() -> None:
    setting = Setting(start=16, cap=64, lr=LR(base=0.1), samples=57480, epoch=1437)
    aimed, by_hand = (
        setting.controller({"growth": {"kind": "matched", **growth}})
        for growth in ({"objective": AIM}, {"start": 152, "cap": 608})
    )
    assert list(aimed.outline(Progress())) == list(by_hand.outline(Progress()))


def test_in_python_the_numbers_are_the_same() -> None:
    aim = objective(8, 400, 0.0121, 2500)
    for make in (auto, late, matched):
        assert (make(objective=aim).start, make(objective=aim).cap) == (152, 608)
    with pytest.raises(ConfigError, match=r"start=16 and objective"):
        auto(16, objective=aim)


# ── the plan ────────────────────────────────────────────────────────────────────────────────────────────────────


def cells(lines: list[str]) -> list[list[float]]:
    return [[float(cell.replace(",", "").replace("plan", "0")) for cell in line.split()] for line in lines]


def test_the_costs_of_stages_add_up_to_those_of_the_plan_and_prices_are_worker_hours() -> None:
    run = run_of({"kind": "matched", "objective": AIM})
    controller, pace = run.controller(8), Pace(samples_per_s=2500, latency_s=0.0121)
    whole = cost(pace, stretches(controller))
    last = cells(constant_batches(controller, pace, 400, 3600.0)[-1:])[0]
    assert last[1:4] == pytest.approx([whole.seconds, whole.worker_seconds, whole.worker_seconds], abs=0.051)
    head, names, *lines = by_stage(controller, pace, 400, 3600.0, 99)
    assert (head, names.split()) == (
        "along the schedule:",
        ["batch", "workers", "seconds", "worker-seconds", "price", "÷", "fastest"],
    )
    stages = cells(lines)
    assert sum(stage[2] for stage in stages) == pytest.approx(whole.seconds, abs=0.05 * len(stages))
    for batch, *_, slower in stages[:3]:
        aim = Objective(**AIM)
        assert slower == pytest.approx(
            seconds(aim, int(batch), 400) / (math.sqrt(0.0121) + math.sqrt(0.02)) ** 2, abs=6e-3
        )
        assert slower <= 1.13
    assert by_stage(controller, pace, 400, None, 1)[-1] == f"  … {len(stages) - 1} more"


def test_the_plan_tells_what_is_decided_and_from_what_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    aim = Objective(**AIM)
    assert show(run_of({"kind": "matched", "objective": AIM}, launch={"workers": 8}), None, 40, aim.pace, 400, 2.5)
    out = capsys.readouterr().out
    assert "n½ = 242; at a noise scale of 400 b* = 311 is fastest: start 152, cap 608" in out
    tabular = [line for line in out.splitlines() if line.startswith("  ")]
    assert len(tabular) > 10
    assert max(map(len, tabular)) <= 80
    assert "launch.workers" not in out
    show(run_of({"kind": "matched", "objective": AIM}), None, 40, aim.pace, 400)
    out = capsys.readouterr().out
    assert "launch.workers=1, and the objective is of 8" in out
    assert "at constant batches on 8 workers" in out


@given(st.floats(1e-300, 1e300), st.integers(0, 3))
@example(0.75, 1)  # half-way between two that can be shown
def test_an_amount_is_never_shown_as_nothing_nor_with_hundreds_of_digits(amount: float, places: int) -> None:
    text = shown(amount, places)
    assert float(text.replace(",", "")) == pytest.approx(amount, rel=0.06, abs=0.50000001 * 10**-places)
    assert float(text.replace(",", "")) > 0
    assert len(text) <= 24


def test_a_price_without_seconds_or_of_nothing_is_refused() -> None:
    assert checked_price(None, None) is None
    with pytest.raises(ConfigError, match=r"--price=2 .* no pace is known: give --like RUN, launch\.pace or"):
        checked_price(2.0, None)
    with pytest.raises(ConfigError, match=r"--price=0 must be a number above 0"):
        checked_price(0.0, Pace(samples_per_s=1))


def test_an_earlier_run_is_shown_as_an_objective_that_can_be_given(tmp_path: Path) -> None:
    script = Script().event("start").stage(0, 8, 8).updates(*[1.0] * 40)
    for k, event in enumerate(event for event in script.events if event["event"] == "step"):
        event["noise_scale"] = 50.0 if k < 15 else 70.0 if k < 25 else 800.0
    folder = script.save(tmp_path / "run")
    run, pace = run_of({"kind": "auto", "start": 16}), Pace(samples_per_s=500, latency_s=0.08)
    (line,) = as_objective(run, run.controller(2), pace, str(folder))
    given_back = line.removeprefix("as an objective: growth.objective: ")
    aim = Objective(**yaml.safe_load(given_back))
    assert aim == Objective(workers=2, noise=50, noise_at_end=800, latency_s=0.08, samples_per_s=500)
    assert given_back == "{workers: 2, noise: 50, noise_at_end: 800, latency_s: 0.08, samples_per_s: 500}"
    fast = as_objective(run, run.controller(2), Pace(samples_per_s=1e5, latency_s=1e-17), str(folder))[0]
    assert yaml.safe_load(fast.partition("objective: growth.objective: ")[2])["samples_per_s"] == 1e5
    for kind in re.findall(r"\w+", AIMED.replace(" or ", " ")):
        rate = {"base": 0.1, **({"decay": {"kind": "cosine"}} if kind in ("increase", "seesaw") else {})}
        for given_already, beside in ((None, ""), (AIM, ""), ({**AIM, "most": 900}, ", most: 900")):
            growth: dict[str, Any] = {"cap": 64} if given_already is None else {"objective": given_already}
            aimed = run_of({"kind": kind, **growth}, lr=rate)
            (again,) = as_objective(aimed, aimed.controller(2), pace, str(folder))
            assert again == f"{line[:-1]}{beside}}}", (kind, given_already)
    assert as_objective(run_of({"kind": "constant"}), run.controller(2), pace, str(folder)) == []
    assert "no latency" in as_objective(run, run.controller(2), Pace(samples_per_s=500), str(folder))[0]
    for event in script.events[:20]:
        event.pop("noise_scale", None)
    (why,) = as_objective(run, run.controller(2), pace, str(script.save(tmp_path / "silent")))
    assert "no noise scale in the first quarter" in why
