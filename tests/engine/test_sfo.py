"""Real runs of the SFO benchmark: what is measured beside them is exact and leaves no trace; the whole thing, tiny."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sfo
import sfo_contestants
import sfo_problems
import sfo_sizes
import torch
from conftest import ROOT
from sfo_paper import paper
from sfo_results import Course, Reading, Store
from sfo_runs import Ended, Places, Watch, looking, play
from sfo_tasks import cross_entropy, noisy_digits

from distgrow.config.load import parse
from distgrow.data import datasets
from distgrow.tracking.base_event import Line
from distgrow.training.fit import fit

BASE = sfo_problems.digits().base
SHORT = {
    "growth": {"kind": "exponential", "start": 16},
    "stages": {"every": {"epochs": 1.0}},
    "budget": {"epochs": 3.0},
}


def test_the_measured_gradient_is_that_of_the_penalised_mean_loss() -> None:
    torch.manual_seed(0)
    task, penalty = noisy_digits(), 0.05
    for rows in (2048, 100):
        seen = looking(task, penalty, rows)()
        parameters = list(task.model.parameters())
        assert all(parameter.grad is None for parameter in parameters)
        inputs, labels = task.train.inputs, task.train.labels
        loss = cross_entropy(task.model, (inputs, labels))
        whole = loss + penalty / 2 * sum((p.square().sum() for p in parameters), torch.zeros(()))
        squares = sum(float(part.square().sum()) for part in torch.autograd.grad(whole, parameters))
        assert seen.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-5)
        assert seen.loss == pytest.approx(loss.item(), rel=1e-5)
        assert seen.accuracy == pytest.approx(right(task.model, task.test.inputs, task.test.right))


def right(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy."""
    return float((model(inputs).argmax(-1) == labels).float().mean())


def test_a_fifth_of_the_labels_is_wrong_and_always_the_same() -> None:
    train, again = noisy_digits().train, noisy_digits().train
    assert (train.labels != train.right).float().mean().item() == pytest.approx(0.2, abs=1e-3)
    assert torch.equal(train.labels, again.labels)
    assert torch.equal(train.right, datasets.digits()[0].labels)


def test_the_constants_of_the_digits_are_those_of_the_problem() -> None:
    train, known = noisy_digits().train, sfo_problems.DIGITS
    inputs = torch.nn.functional.pad(train.inputs.flatten(1).double(), (0, 1), value=1.0)
    weights = torch.zeros(10, 65, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=800, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ weights.T, train.labels)
        (loss := loss + known["mu"] / 2 * weights.square().sum()).backward()
        return loss

    optimizer.step(objective)
    assert weights.grad is not None and weights.grad.norm() < 1e-4
    errors = torch.softmax(inputs @ weights.T, 1) - torch.nn.functional.one_hot(train.labels, 10)
    gradients = torch.einsum("nc,nd->ncd", errors, inputs) + known["mu"] * weights
    assert known["optimum_sq"] == pytest.approx(gradients.square().sum((1, 2)).mean().item(), rel=1e-3)
    largest = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))[-1].item()
    assert known["smoothness"] == pytest.approx(largest / 2 + known["mu"], rel=1e-3)
    assert known["largest_smoothness"] == pytest.approx(inputs.square().sum(1).max().item() / 2 + known["mu"], rel=1e-3)
    assert known["samples"] == len(inputs)


def test_what_is_measured_does_not_depend_on_where_else_it_is() -> None:
    """Runs that are looked at more or less often go the same way, and cost a policy the same."""
    often, seldom = Course(), Course()
    for course, first in ((often, 0.1), (seldom, 1.0)):
        play(parse({**BASE, **SHORT}), 3, course, None, places=Places(first=first))
    assert often.last == seldom.last
    assert (often.sfo, often.stretches) == (seldom.sfo, seldom.stretches)
    assert often.sfo == 3 * 1437 == sum(batch * updates for batch, updates in often.stretches)


def test_a_run_ends_when_it_arrives() -> None:
    course = Course()
    assert play(parse({**BASE, **SHORT}), 0, course, 0.2, places=Places(first=0.1))[1] == "arrived"
    assert course.last is not None and course.last.grad_norm <= 0.2 and course.sfo < 3 * 1437


@pytest.mark.parametrize("still", [True, False])
def test_a_constant_run_ends_at_its_floor_and_no_other(still: bool) -> None:
    """‖∇f‖ falls for 10 epochs of 100 samples and then stays: 30 are enough."""
    course, epochs, ended = Course(), 0, ""
    watch = Watch(lambda: Reading(grad_norm=max(0.5, 5 / epochs), loss=1.0), course, Places(first=1.0), 100, 0.1, still)
    try:
        for epochs in range(1, 50):
            place = {"step": epochs, "samples": 100 * epochs, "sfo": 100 * epochs}
            watch.log({"event": "step", "batch": 100, "samples_per_s": 1.0, **place})
    except Ended as reason:
        ended = str(reason)
    assert (ended, epochs) == (("at its floor", 31) if still else ("", 49))


class Probes:
    """A tracker that keeps ‖∇f‖ as distgrow itself has measured it."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def log(self, event: Line) -> None:
        if event["event"] == "probe":
            self.norms.append(event["norm"])

    def close(self) -> None: ...


def test_what_is_measured_is_what_exact_probes_find(tmp_path: Path) -> None:
    run = parse({**BASE, **SHORT, "run": {"dir": str(tmp_path / "run"), "probe": {"every_epochs": 10.0}}})
    torch.manual_seed(0)
    task, course, probes = run.task.build(None), Course(), Probes()
    watch = Watch(looking(task, 1e-3, 500), course, Places(first=100.0), 1437, None, still=False)
    parts = {"growth": run.growth, "stages": run.stages, "lr": run.lr, "budget": run.budget, "engine": run.engine}
    fit(task.model, task.loss, task.train, **parts, optimizer=run.optimizer, run=run.run, trackers=[watch, probes])
    assert course.last is not None and len(probes.norms) == 2
    assert course.last.grad_norm == pytest.approx(probes.norms[-1], rel=1e-5)


def test_a_policy_that_does_not_exist_is_told_of_and_not_a_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = sfo_contestants.Policy(name="missing", grid=sfo_contestants.measuring("missing"))
    problem = replace(sfo_sizes.smoke()[0], policies=(missing, *sfo_contestants.POLICIES[:2]))
    store = Store(tmp_path / "quadratic.jsonl")
    sfo.run_all(problem, store, 1, [])
    assert "quadratic: missing, 1 settings: not available" in capsys.readouterr().err
    assert {result.policy for result in store.results} == {"constant", "step decay"}
    rows = {row[0]: row[1] for row in sfo.report(problem, store, tmp_path)[0][0].rows}
    assert rows["missing"] == "not available" and rows["constant"].startswith("b=")


def test_what_has_run_is_not_run_again(tmp_path: Path) -> None:
    problem = sfo_sizes.smoke()[1]
    store = Store(tmp_path / "digits.jsonl")
    sfo.run_all(problem, store, 1, ["constant", "linear"])
    lines = store.path.read_text().splitlines()
    store.path.write_text("\n".join(lines[:1]) + "\n")
    sfo.run_all(problem, again := Store(store.path), 2, ["constant", "linear"])
    assert store.path.read_text().splitlines()[0] == lines[0]
    runs = [(result.policy, result.setting, result.seed) for result in again.results]
    assert len(set(runs)) == len(runs) >= len(lines)
    first = {(r.policy, r.setting): (r.grad_norm, r.last) for r in store.results}
    assert first == {(r.policy, r.setting): (r.grad_norm, r.last) for r in again.results if r.seed == 0}


def test_only_runs_of_the_grid_as_it_is_now_count(tmp_path: Path) -> None:
    problem = sfo_sizes.smoke()[0]
    store = Store(tmp_path / "quadratic.jsonl")
    sfo.run_all(problem, store, 1, ["constant"])
    longer = replace(problem, scale=replace(problem.scale, long=2.0))
    assert problem.own(store.results) == store.results != [] and longer.own(store.results) == []
    sfo.run_all(longer, store, 1, ["constant"])
    assert len(longer.own(store.results)) == len(problem.own(store.results)) == len(store.results) // 2


def folder_of_images(folder: Path, label: str, **rows: int) -> str:
    """Parquet files of random 8×8 images, as many in each part as `rows` says."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in rows.items():
        cells = list[dict]()
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(file, "PNG")
            cells.append({"bytes": file.getvalue(), "path": None})
        pq.write_table(pa.table({"img": cells, label: random.integers(0, 99, count)}), folder / f"{part}.parquet")
    return str(folder)


@pytest.mark.slow
def test_the_published_setting_stands_beside_its_figures(tmp_path: Path) -> None:
    data = folder_of_images(tmp_path, "fine_label", train=300, test=8)
    problem, adam = paper(data, classes=100, epochs=1.0, subset=290)
    store = Store(tmp_path / "paper.jsonl")
    sfo.run_all(problem, store, 1, ["b=32", "b 32 → 256"])
    assert [(r.policy, r.sfo, r.epoch, r.stretches) for r in store.results] == [
        ("b=32", 290, 290, [(32, 8), (34, 1)]),
        ("b 32 → 256", 290, 290, store.results[1].stretches),
    ]
    table = sfo.report(problem, store, tmp_path)[0][-1]
    published = {row[0]: row[-1] for row in table.rows}
    assert published["b 32 → 256"].startswith(".00360 / 74.03")
    assert {policy.name for policy in adam.policies} <= {policy.name for policy in problem.policies}


@pytest.mark.slow
def test_the_whole_benchmark_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/sfo.py"), "--smoke", "--results", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tasks = [problem.name for problem in sfo_sizes.smoke()]
    for task in tasks:
        results = [json.loads(line) for line in (tmp_path / f"{task}.jsonl").read_text().splitlines()]
        assert {"constant", "step decay", "cosine decay", "exponential"} <= {result["policy"] for result in results}
    assert done.stdout.count("‖∇f‖ last (lowest)") >= len(tasks)
    assert list(tmp_path.glob("*.png"))
