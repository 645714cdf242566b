"""what-if finds the numbers of a law again, ranks schedules as a simulation does, and says when it cannot."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from sfo_tasks import noisy_digits

from distgrow import budget, constant, fit, late, matched
from distgrow.core.errors import ConfigError
from distgrow.core.lr import LR, WSD, Cosine, Decay, NoDecay
from distgrow.core.progress import Progress
from distgrow.growth.base import GrowthPolicy
from distgrow.planning.forecast import even, stages
from distgrow.planning.what_if.candidates import Setting
from distgrow.planning.what_if.fit import fit as fit_law
from distgrow.planning.what_if.fit import told
from distgrow.planning.what_if.observed import Observed, observed
from distgrow.planning.what_if.outlook import foresee_more, what_if
from distgrow.planning.what_if.show import show
from distgrow.report.runs import read
from distgrow.report.write import write
from distgrow.theory.scaling_law import Course, Law, course
from distgrow.training.spec import RunSpec

Array = NDArray[np.float64]
EPOCH = 4000
LAW = Law(floor=1.5, scale=4.0, power=0.5, noise=0.6, decay=1.5, unit=3.0)
SETTING = Setting(start=8, cap=256, lr=LR(base=0.3), samples=40_000, epoch=EPOCH)


def parts_of(values: dict[str, Any], setting: Setting = SETTING) -> list[tuple[int, float, int]]:
    controller = setting.controller(values)
    return [part for stage in stages(controller) for part in even(controller, stage)]


def record(
    folder: Path,
    parts: Sequence[tuple[int, float, int]],
    losses: Sequence[float] | Array,
    config: dict[str, Any] | None = None,
    *,
    end: bool = True,
    every: int = 1,
    planned: int | None = None,
    evaluations: int = 0,
) -> str:
    """A run folder with a line for every update; `losses` are those before each update."""
    lines: list[dict[str, Any]] = [{"event": "start", "step": 0, "samples": 0, "time_s": 0.0}]
    lines[0] |= {"budget_samples": planned} if planned else {}
    step = samples = 0
    for count, lr, batch in parts:
        for _ in range(count):
            loss = float(losses[step])
            step, samples = step + 1, samples + batch
            place = {"step": step, "samples": samples, "time_s": 0.01 * step, "sfo": samples}
            shape = {"epoch": samples / EPOCH, "stage": 0, "batch": batch, "lr": lr, "world": 1}
            if step % every == 0:
                lines.append({"event": "step", **place, **shape, "loss": loss, "grad_norm": None, "samples_per_s": 1e3})
            if evaluations and step % evaluations == 0:
                lines.append({"event": "eval", **place, "epoch": samples / EPOCH, "error": loss + 1})
    if end:
        lines.append({"event": "end", "step": step, "samples": samples, "time_s": 0.01 * step, "reason": "done"})
    folder.mkdir(parents=True)
    plain = {
        "growth": {"kind": "constant", "start": 8},
        "stages": {},
        "lr": {"base": 0.3},
        "budget": {"samples": samples},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**plain, **(config or {})}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@cache
def along(law: Law, parts: tuple[tuple[int, float, int], ...]) -> Array:
    """The law's loss before each update, and after the last: the sum of its definition."""
    rates, batches = (np.repeat([part[k] for part in parts], [part[0] for part in parts]) for k in (1, 2))
    times, weights = np.cumsum(rates), rates**2 / batches
    kept = [
        np.sum(weights[: t + 1] * ((times[t] - times[: t + 1]) / law.unit + 1) ** -law.decay) for t in range(len(times))
    ]
    losses = law.floor + law.scale * times**-law.power + law.noise * np.array(kept)
    return np.concatenate([losses[:1], losses])


def noisy(losses: Array, scatter: float, seed: int) -> Array:
    return losses + np.random.default_rng(seed).normal(0, scatter, len(losses))


#: A run that shows everything: two plateaus of temperature, and a decay.
TELLING = ((2000, 0.3, 8), (600, 0.3, 32), (400, 0.1, 8), (800, 0.3, 8), (1000, 0.03, 8))


# ── the fit ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_numbers_of_the_law_are_found_again(tmp_path: Path) -> None:
    run = record(tmp_path / "run", TELLING, along(LAW, TELLING))
    found = fit_law([observed(read([run])[0])], 0.0).law
    assert found.floor == pytest.approx(LAW.floor, rel=0.03)
    assert found.power == pytest.approx(LAW.power, rel=0.15)  # A, s and L∞ make up for one another
    times = np.array([300.0, 600.0, 1200.0, 2400.0])
    assert found.quiet(times) == pytest.approx(LAW.quiet(times), rel=0.003)
    kept, real = (
        law.loss(course([(10**6, 0.3, 8)]))[0] - law.loss(course([(10**6, 0.3, 10**9)]))[0] for law in (found, LAW)
    )
    assert kept == pytest.approx(real, rel=0.15)  # what noise keeps up in the long run


def test_two_runs_tell_apart_what_neither_of_them_shows_alone(tmp_path: Path) -> None:
    """At constant η and b, L∞ and what noise keeps up are one number; two batches make them two."""
    seen = list[Observed]()
    for batch, updates in ((8, 3000), (64, 2000)):
        parts = ((updates, 0.3, batch),)
        seen.append(observed(read([record(tmp_path / str(batch), parts, along(LAW, parts))])[0]))
    assert fit_law(seen).law.floor == pytest.approx(LAW.floor, rel=0.03)
    assert all(abs(fit_law([run]).law.floor / LAW.floor - 1) > 0.06 for run in seen)


def test_the_batch_that_balances_noise_is_found_from_two_runs(tmp_path: Path) -> None:
    """Normalised steps: the same updates go further with the larger batch."""
    law = replace(LAW, balance=40.0, noise=0.3)
    seen = list[Observed]()
    for batch in (8, 64):
        parts = ((1500, 0.3, batch), (500, 0.03, batch))
        losses = law.loss(course([(1, lr, b) for count, lr, b in parts for _ in range(count)]), range(2000))
        seen.append(observed(read([record(tmp_path / str(batch), parts, losses)])[0]))
    assert fit_law(seen, None).law.balance == pytest.approx(40, rel=0.3)


def test_whole_epochs_do_not_depend_on_which_samples_come_when(tmp_path: Path) -> None:
    """A loss that is the same 500 numbers every epoch, shuffled anew: blocks scatter, epochs are equal."""
    parts, random = ((8000, 0.3, 8),), np.random.default_rng(0)
    own = 2 + random.normal(0, 0.5, EPOCH // 8)
    losses = np.concatenate([random.permutation(own) for _ in range(16)])
    seen = observed(read([record(tmp_path / "run", parts, losses)])[0])
    assert seen.epochs == 12
    assert seen.losses[-12:] == pytest.approx(own.mean())
    assert np.ptp(seen.losses[:-12]) > 0.01
    assert seen.over.sum(axis=1) == pytest.approx(1)


@pytest.mark.slow
def test_of_noisy_runs_nine_in_ten_intervals_hold_the_truth(tmp_path: Path) -> None:
    telling = along(LAW, TELLING)
    others = [
        parts_of(SETTING.all()[name]) for name in ("constant", "cosine", "wsd80", "matched", "late", "exponential")
    ]
    truths = [LAW.loss(course(parts))[0] for parts in others]
    held, errors = list[bool](), list[float]()
    for seed in range(10):
        run = record(tmp_path / f"{seed}", TELLING, noisy(telling, 0.1, seed))
        found = fit_law([observed(read([run])[0])], 0.0)
        for parts, truth in zip(others, truths, strict=True):
            loss, low, high = found.predict(course(parts))
            held.append(low <= truth <= high)
            errors.append(abs(loss / truth - 1))
            assert low <= high
    assert np.mean(held) >= 0.85
    assert np.median(errors) < 0.01


def test_noise_that_a_run_could_not_show_makes_the_interval_wide(tmp_path: Path) -> None:
    """At constant η and b, L∞ and what noise keeps up are one number."""
    plain = ((5000, 0.3, 8),)
    blind = fit_law([observed(read([record(tmp_path / "blind", plain, along(LAW, plain))])[0])], 0.0)
    telling = fit_law([observed(read([record(tmp_path / "telling", TELLING, along(LAW, TELLING))])[0])], 0.0)
    other = course(parts_of(SETTING.all()["wsd50"]))
    widths = [high - low for _, low, high in (blind.predict(other), telling.predict(other))]
    assert widths[0] > 3 * widths[1]


def test_lines_that_are_not_logged_change_little(tmp_path: Path) -> None:
    losses = along(LAW, TELLING)
    one, other = (observed(read([record(tmp_path / str(every), TELLING, losses, every=every)])[0]) for every in (1, 10))
    assert other.course.times[-1] == pytest.approx(one.course.times[-1], rel=0.01)
    assert other.course.samples[-1] == pytest.approx(one.course.samples[-1], rel=0.01)
    wsd = course(parts_of(SETTING.all()["wsd80"]))
    assert fit_law([one], 0.0).predict(wsd)[0] == pytest.approx(fit_law([other], 0.0).predict(wsd)[0], rel=0.01)


def test_a_course_in_few_parts_has_the_time_and_the_noise_of_every_update(tmp_path: Path) -> None:
    seen = observed(read([record(tmp_path / "run", TELLING, along(LAW, TELLING))])[0])
    assert len(seen.course.updates) < 600
    whole = sum(lr**2 / batch * count for count, lr, batch in TELLING)
    assert np.sum(seen.course.updates * seen.course.rates**2 / seen.course.batches) == pytest.approx(whole)
    assert LAW.loss(seen.course)[0] == pytest.approx(along(LAW, TELLING)[-1], rel=1e-3)


# ── an independent simulation ───────────────────────────────────────────────────────────────────────────────────


def quadratic(parts: Sequence[tuple[int, float, int]]) -> Array:
    """E f of SGD before every update and after the last, on a quadratic with a spectrum that falls as a power."""
    h = np.arange(1, 301) ** -1.5
    moments, noise = h**-0.3, 2.0 * h
    losses = list[float]()
    for count, lr, batch in parts:
        for _ in range(count):
            losses.append(float(h @ moments) / 2)
            moments = (1 - lr * h) ** 2 * moments + lr**2 / batch * noise
    return np.array([*losses, float(h @ moments) / 2]) + 0.3


def ranks(values: Sequence[float]) -> Array:
    return np.argsort(np.argsort(values)).astype(float)


@pytest.mark.parametrize("recorded", ["constant", "wsd50", "late", "matched-30"])
def test_on_a_quadratic_the_ranking_is_that_of_the_simulation(recorded: str, tmp_path: Path) -> None:
    losses = noisy(quadratic(parts_of(SETTING.all()[recorded])), 0.02, 0)
    variance = 2.0 * float(np.sum(np.arange(1, 301) ** -1.5))
    run = record(tmp_path / "run", parts_of(SETTING.all()[recorded]), losses)
    seen = observed(read([run])[0])
    found = fit_law([replace(seen, variance=variance)], 0.0)
    names = [name for name in SETTING.all() if name != "optimal"]
    real = [float(quadratic(parts_of(SETTING.all()[name]))[-1]) for name in names]
    foretold = [found.predict(course(parts_of(SETTING.all()[name]))) for name in names]
    assert np.corrcoef(ranks(real), ranks([loss for loss, _, _ in foretold]))[0, 1] > 0.75
    assert np.median([abs(loss / truth - 1) for (loss, _, _), truth in zip(foretold, real, strict=True)]) < 0.05
    assert np.mean([low <= truth <= high for (_, low, high), truth in zip(foretold, real, strict=True)]) >= 0.7


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    parts = ((2000, 0.3, 8), (500, 0.3, 16), (250, 0.3, 32), (250, 0.03, 32))
    folder = tmp_path_factory.mktemp("what_if") / "run"
    return record(folder, parts, noisy(along(LAW, parts), 0.05, 1), evaluations=50)


def test_the_table_ranks_all_schedules_by_loss_in_80_columns(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = show(run)
    lines = capsys.readouterr().out.splitlines()
    table = lines[: next(k for k, line in enumerate(lines) if line.startswith("loss = "))]
    assert max(map(len, table)) <= 80
    losses = [prospect.loss for prospect in found.prospects]
    assert losses == sorted(losses)
    setting = Setting(start=8, cap=178, lr=LR(base=0.3), samples=40_000, epoch=EPOCH)
    assert {prospect.name for prospect in found.prospects} == set(setting.all())
    assert any(line.startswith("this run") for line in table)
    assert all(prospect.low <= prospect.high for prospect in found.prospects)


def test_updates_and_seconds_are_those_of_the_plan(run: str, tmp_path: Path) -> None:
    found = {each.name: each for each in what_if(read([run])[0], ["constant", "matched"]).prospects}
    assert found["constant"].updates == 40_000 // 8
    outline = SETTING.controller(SETTING.all()["matched"]).outline(Progress())
    assert found["matched"].updates == pytest.approx(sum(updates for _, _, updates in outline), rel=0.01)
    assert all(each.seconds == pytest.approx(40) for each in found.values())  # 1,000 samples a second, no latency
    plain = ((2000, 0.3, 8),)
    still = record(tmp_path / "still", plain, along(LAW, plain))
    unknown = what_if(read([still])[0], ["constant"])
    assert unknown.pace is None
    assert unknown.prospects[0].seconds is None
    assert "rows per worker" in unknown.why_no_pace
    assert "launch.pace" not in unknown.why_no_pace, "what-if does not read it"


def test_json_holds_what_the_table_shows(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = show(run, ["matched", "{kind: late, cap: 64}"], as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in shown["schedules"]] == [each.name for each in found.prospects]
    assert shown["schedules"][0]["loss"] == found.prospects[0].loss
    assert set(shown["law"]) == {"floor", "scale", "power", "noise", "decay", "unit", "falling", "balance"}


def test_policies_are_names_yaml_and_configs(run: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "task: {kind: digits}\ngrowth: {kind: matched, start: 8, cap: 64}\nlr: {base: 0.3, decay: {kind: wsd}}\n"
    )
    policies = [
        "late",
        "{kind: late, cap: 565}",
        "{growth: {kind: constant}, lr: {base: 0.1}}",
        str(tmp_path / "mine.yaml"),
    ]
    found = {each.name: each for each in what_if(read([run])[0], policies).prospects}
    assert set(found) == {*policies[:3], "mine"}
    assert found["late"].loss == found["{kind: late, cap: 565}"].loss
    assert found["mine"].batch <= 64 + 7
    more = what_if(read([run])[0], ["late"], everything=True).prospects
    assert len([each for each in more if each.name == "late"]) == 1
    assert len(more) == len(what_if(read([run])[0]).prospects)


def test_an_evaluated_metric_is_fitted_in_place_of_the_training_loss(run: str) -> None:
    plain, other = (what_if(read([run])[0], ["wsd80"], metric=metric).prospects[0] for metric in (None, "error"))
    assert other.loss == pytest.approx(plain.loss + 1, rel=0.02)


def test_a_warm_up_is_kept() -> None:
    setting = Setting(start=8, cap=64, lr=LR(base=0.3, decay=Cosine(warmup=0.1)), samples=40_000, epoch=EPOCH)
    for name, values in setting.all().items():
        controller = setting.controller(values)
        assert (
            getattr(controller.lr.decay, "warmup", None) == (0.0 if name == "linear-decay" else 0.1)
            or name == "temperature"
        )


def test_no_schedule_by_default_raises_the_rate_or_measures() -> None:
    for values in SETTING.all().values():
        assert all(lr <= 0.3 * (1 + 1e-12) for _, lr, _ in parts_of(values))
        assert not SETTING.controller(values).growth.needs


def test_the_report_shows_the_best_three(run: str, tmp_path: Path) -> None:
    best = what_if(read([run])[0]).prospects[:3]
    write([run], str(tmp_path), foresee_more)
    page = (tmp_path / "report.html").read_text()
    assert "What if" in page
    for prospect in best:
        assert f"{prospect.loss:.4g}" in page
    write([run], str(tmp_path / "none"), lambda _: None)
    assert "What if" not in (tmp_path / "none/report.html").read_text()


def test_a_report_of_a_run_that_shows_too_little_has_no_such_section(tmp_path: Path) -> None:
    short = record(tmp_path / "short", [(20, 0.3, 8)], [1.0] * 20)
    found = foresee_more(read([short])[0])
    assert found is not None
    assert found.prospects == ()


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_is_none_or_shows_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist"):
        show(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"20 updates with a loss, too few.*log_every"):
        show(record(tmp_path / "short", [(20, 0.3, 8)], [1.0] * 20))
    with pytest.raises(ConfigError, match=r"has spent 40% of its budget"):
        show(record(tmp_path / "early", [(400, 0.3, 8)], [1.0] * 400, end=False, planned=8000))
    config = {"sparsity": {"target": 0.5}}
    with pytest.raises(ConfigError, match=r"has sparsity"):
        show(record(tmp_path / "sparse", [(400, 0.3, 8)], [1.0] * 400, config))
    with pytest.raises(ConfigError, match=r"no growth and lr"):
        show(record(tmp_path / "new", [(400, 0.3, 8)], [1.0] * 400, {"growth": {"kind": "not yet"}}))


def test_runs_of_another_kind_are_not_fitted_together(run: str, tmp_path: Path) -> None:
    parts = ((400, 0.3, 8), (400, 0.03, 8))
    other = record(tmp_path / "other", parts, along(LAW, parts), {"optimizer": {"kind": "adamw"}})
    with pytest.raises(ConfigError, match=r"other: its optimizer is not that of run"):
        show([run, other])


def test_several_runs_are_rows_of_the_table_beside_the_first(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ((1000, 0.3, 8), (400, 0.03, 8))
    other = record(tmp_path / "other", parts, along(LAW, parts))
    found = show([run, other], ["constant"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("this run", "other"))] != []
    assert found.beside[0].name == "other"
    assert found.beside[0].loss == pytest.approx(along(LAW, parts)[-1], rel=0.02)
    assert found.prospects[0].updates == 40_000 // 8  # the budget is the first run's


def test_a_run_that_is_past_its_half_is_taken_to_its_budget(tmp_path: Path) -> None:
    parts = ((600, 0.3, 8), (600, 0.1, 8))
    run = record(tmp_path / "run", parts, along(LAW, parts), end=False, planned=16_000)
    found = what_if(read([run])[0], ["constant"])
    assert found.seen.samples == 16_000
    assert found.prospects[0].updates == 2000


@pytest.mark.parametrize(
    "policy", ["auto", "noise_scale", "{kind: progress_test, cap: 64}", "{kind: adascale, scale: 4}"]
)
def test_growth_that_measures_is_refused_with_what_to_give_instead(policy: str, run: str) -> None:
    with pytest.raises(ConfigError) as refused:
        show(run, [policy])
    assert "matched, hold: 0.3" in str(refused.value) or "cap" in str(refused.value)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("nonsense", "name one of"),
        ("[1]", "name one of constant"),
        ("{lr: {base: 0.1}}", "name one of constant"),
        ("{growth: {kind: constant}, budget: {steps: 1}}", "budget: unknown key"),
        ("{kind: late, hold: 2}", "hold"),
        ("{kind: constant, start: 100000}", "of the training set"),
        ("{kind: seesaw, cap: 64}", "set lr.decay"),
        ("missing.yaml", "missing.yaml"),
        ("{kind: [", "--policy"),
    ],
)
def test_a_policy_that_is_none_is_refused(policy: str, told: str, run: str) -> None:
    with pytest.raises(ConfigError) as refused:
        show(run, [policy])
    assert told in str(refused.value)


def test_a_metric_that_rises_is_refused(run: str, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    for place, line in enumerate(map(json.loads, lines)):
        if line["event"] == "eval":
            lines[place] = json.dumps(line | {"accuracy": 1 - line["error"] / 10})
    Path(own, "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"--metric=accuracy.*losses that fall"):
        show(str(own), metric="accuracy")


def test_a_metric_that_is_not_there_or_seldom_is_refused(run: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluated it 0 times.*its metrics: error"):
        show(run, metric="f1")


# ── real runs ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_real_runs_end_near_what_one_of_them_predicts(tmp_path: Path) -> None:
    """Softmax regression on digits with a fifth of the labels wrong; the mean loss of the last blocks is the end."""
    schedules: dict[str, tuple[GrowthPolicy, Decay]] = {
        "constant": (constant(16), NoDecay()),
        "wsd50": (constant(16), WSD(decay=0.5)),
        "linear": (constant(16), WSD(decay=1.0)),
        "matched": (matched(16, 256), NoDecay()),
        "late": (late(16, 256), NoDecay()),
    }
    task, runs = noisy_digits(), dict[str, str]()
    for name, (growth, decay) in schedules.items():
        runs[name] = str(tmp_path / name)
        fresh = noisy_digits()
        fit(
            fresh.model, task.loss, task.train, growth=growth, budget=budget(epochs=20), lr=LR(base=0.5, decay=decay),
            run=RunSpec(dir=runs[name]),
        )  # fmt: skip
    seen = {name: observed(record) for name, record in zip(runs, read(runs.values()), strict=True)}
    errors = list[float]()
    for one, other in ((a, b) for a in seen for b in seen if a != b):
        law, there = fit_law([seen[one]]).law, seen[other]
        errors.append(abs(float(told(law, there)[-1] / there.losses[-1]) - 1))  # the last epoch
    assert np.median(errors) < 0.02
    assert max(errors) < 0.15


def test_courses_are_compared_as_they_were_trained() -> None:
    """The parts of a plan add up to its budget, and differ from update to update by little."""
    for values in SETTING.all().values():
        found: Course = course(parts_of(values))
        assert found.samples[-1] == pytest.approx(SETTING.samples, rel=0.01)
    rates = [lr for _, lr, _ in parts_of(SETTING.all()["cosine"])]
    assert all(after <= before for before, after in pairwise(rates))
