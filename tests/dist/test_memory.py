"""A rank that runs out of memory: all ranks agree, and the same batch comes again in smaller micro-batches."""

from typing import Any

import pytest
import torch
from conftest import Commands, events, ledger, parameters
from conftest import wounded as with_faults

from distgrow.checkpoint.export import weights_of

pytestmark = pytest.mark.fault

DOUBLE = "engine.precision=float64"


@pytest.fixture
def wounded(distgrow: Commands) -> Commands:
    """Commands that find the task."""
    return with_faults(distgrow)


def task(function: str = "small", **args: Any) -> tuple[str, ...]:
    written = ", ".join(f"{key}: {str(value).lower()}" for key, value in args.items())
    return (f"task={{kind: target, target: 'wounded:{function}', args: {{{written}}}}}", "model=null")


@pytest.mark.parametrize(
    ("way", "workers"),
    [
        ("forward", 2),
        ("backward", 2),
        pytest.param("forward", 1, marks=pytest.mark.slow),
        pytest.param("backward", 1, marks=pytest.mark.slow),
    ],
)
def test_one_rank_without_memory_makes_all_halve_the_micro_batch_and_the_result_stays_the_same(
    wounded: Commands, way: str, workers: int
) -> None:
    one = [workers - 1]
    assert wounded.train("plenty", *task(rows=99, way=way, ranks=one), DOUBLE, workers=workers).code == 0
    short = wounded.train("short", *task(rows=5, way=way, ranks=one), DOUBLE, workers=workers)
    assert short.code == 0, short.err
    plenty, run = wounded.folder / "plenty", wounded.folder / "short"
    ooms, steps = events(run, "oom"), events(run, "step")
    assert [(oom["batch"], oom["micro"]) for oom in ooms] == ([(8, 8)] if workers == 1 else [(16, 8)])
    assert max(step["micro"] for step in steps) == 4
    assert [step["batch"] for step in steps] == [step["batch"] for step in events(plenty, "step")]
    assert ledger(run) == {**ledger(plenty), "discarded": sum(oom["batch"] for oom in ooms)}
    whole = parameters(plenty)
    assert (parameters(run) - whole).norm() <= 1e-12 * whole.norm()
    assert "out of memory with micro-batches of 8 rows" in short.err


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_zero_agrees_on_it_too(wounded: Commands, zero: int) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    engine = f"engine={{kind: deepspeed, zero: {zero}}}"
    short = wounded.train("short", *task(rows=5), engine, workers=2)
    assert short.code == 0, short.err
    run = wounded.folder / "short"
    assert [(oom["batch"], oom["micro"]) for oom in events(run, "oom")] == [(16, 8)]
    assert wounded.train("small", *task(rows=99), engine, workers=2).code == 0
    assert ledger(run) == {**ledger(wounded.folder / "small"), "discarded": 16}
    losses = [[step["loss"] for step in events(wounded.folder / name, "step")] for name in ("short", "small")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_statistics_of_batchnorm_do_not_see_what_was_thrown_away(wounded: Commands) -> None:
    limit = ("engine.max_micro=4", DOUBLE)
    assert wounded.train("four", *task(rows=99, norm=True), *limit, workers=2).code == 0
    # the first rank, whose statistics count, has seen its rows when the other runs out of memory
    from_eight = ("engine.max_micro=8", "growth={kind: constant, start: 16}", DOUBLE)
    assert wounded.train("halved", *task(rows=5, norm=True), *from_eight, workers=2).code == 0
    assert wounded.train("small", *task(rows=99, norm=True), *from_eight[1:], "engine.max_micro=4", workers=2).code == 0
    assert (parameters(wounded.folder / "halved") == parameters(wounded.folder / "small")).all()
    assert len(events(wounded.folder / "halved", "oom")) == 1


@pytest.mark.slow
def test_the_limit_survives_a_resume(wounded: Commands) -> None:
    short = task(rows=5)
    assert wounded.train("run", *short, "budget={samples: 800}", workers=2).code == 0
    assert wounded.train("whole", *short, "budget={samples: 800}", "run.checkpoint.every_steps=5", workers=2).code == 0
    assert len(events(wounded.folder / "run", "oom")) == 1
    last = max((wounded.folder / "whole/checkpoints").iterdir())
    for file in last.iterdir():  # the last checkpoint is lost: the run goes on from the one before
        file.unlink()
    assert wounded.train("whole", *short, "budget={samples: 800}", resume=True, workers=2).code == 0
    assert len(events(wounded.folder / "whole", "oom")) == 1
    assert (parameters(wounded.folder / "run") == parameters(wounded.folder / "whole")).all()


@pytest.mark.slow
def test_memory_that_holds_not_even_one_row_is_a_clear_failure_with_a_good_checkpoint(wounded: Commands) -> None:
    failed = wounded.train("run", *task(rows=0), "launch.workers=2")
    assert failed.code == 1
    assert "distgrow: a rank's memory does not hold a micro-batch of one row" in failed.err
    assert "use more workers, a smaller model" in failed.err
    assert "Traceback" not in failed.err
    run = wounded.folder / "run"
    assert [oom["micro"] for oom in events(run, "oom")] == [4, 2, 1]
    assert ledger(run)["discarded"] == 3 * 8


@pytest.mark.slow
def test_a_run_whose_last_batch_is_odd_is_told_as_soon_as_memory_holds_one_row_alone(wounded: Commands) -> None:
    for micro in ("64", "auto"):
        odd = ("budget={samples: 1501}", "launch.workers=2", f"engine.max_micro={micro}")
        failed = wounded.train(f"run{micro}", *task(rows=1), *odd)
        assert failed.code == 1
        assert "holds micro-batches of 1 row, into which this run's batches on 2 ranks cannot be cut" in failed.err
        assert not events(wounded.folder / f"run{micro}", "step")


def test_memory_that_runs_out_in_an_evaluation_names_the_key(wounded: Commands) -> None:
    failed = wounded.train("run", *task(rows=32, evaluating=True), "run.eval.rows=64")
    assert failed.code == 1
    assert "memory does not hold evaluation batches of 64 rows; lower run.eval.rows and go on with" in failed.err
    assert wounded.train("run", *task(rows=32, evaluating=True), "run.eval.rows=32", resume=True).code == 0


def test_memory_that_runs_out_before_the_forward_of_a_model_with_buffers_is_survived(wounded: Commands) -> None:
    assert wounded.train("run", *task("unplaceable"), DOUBLE, "launch.timeout_s=20", workers=2).code == 0
    assert len(events(wounded.folder / "run", "oom")) == 1


def test_real_memory_that_runs_out_on_one_rank_is_survived(wounded: Commands) -> None:
    arguments = (*task("limited", megabytes=300), "growth={kind: constant, start: 512}", "engine.max_micro=256")
    run = wounded.train("run", *arguments, "budget={samples: 1536}", workers=2)
    assert run.code == 0, run.err
    ooms = events(wounded.folder / "run", "oom")
    assert ooms
    assert ledger(wounded.folder / "run") == {
        "applied": 1536, "skipped": 0, "replayed": 0, "discarded": 512 * len(ooms), "probe": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "found"), [(5, 5), *(pytest.param(rows, min(rows, 16), marks=pytest.mark.slow) for rows in (11, 99))]
)
def test_auto_finds_the_largest_micro_batch_that_every_rank_holds_and_leaves_no_trace(
    wounded: Commands, rows: int, found: int
) -> None:
    given = ("optimizer={kind: adamw}", "lr.base=0.01", DOUBLE)
    assert wounded.train("auto", *task(rows=rows, norm=True), *given, "engine.max_micro=auto", workers=2).code == 0
    same = wounded.train("set", *task(rows=99, norm=True), *given, f"engine.max_micro={found}", workers=2)
    assert same.code == 0
    auto, fixed = wounded.folder / "auto", wounded.folder / "set"
    probes = events(auto, "probe")
    assert max(probe["micro"] for probe in probes if probe["fits"]) == found
    assert not events(auto, "oom")
    assert ledger(auto) == {**ledger(fixed), "probe": 2 * sum(probe["micro"] for probe in probes)}
    assert (parameters(auto) == parameters(fixed)).all()  # the statistics of BatchNorm among them


@pytest.mark.parametrize(
    ("way", "ranks", "shard"),
    [
        ("forward", [1], "grad_op"),
        ("forward", [1], "full"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("backward", [0, 1], "grad_op"),
                ("backward", [1], "grad_op, precision: bfloat16, reduce: every"),
                ("forward", [0], "grad_op, checkpoint_blocks: all"),
                ("backward", [1], "full, checkpoint_blocks: all"),
                ("backward", [0], "full, precision: bfloat16, reduce: every"),
                ("forward", [1], "hybrid, replicas: 2, reduce: every"),
            )
        ),
    ],
)
def test_auto_leaves_no_trace_in_shards(wounded: Commands, way: str, ranks: list[int], shard: str) -> None:
    given = ("optimizer={kind: adamw}", "lr.base=0.01")
    for name, micro, rows in (("auto", "auto", 5), ("set", "5", 99)):
        engine = f"engine={{kind: fsdp, shard: {shard}, wrap: [Linear], max_micro: {micro}}}"
        done = wounded.train(name, *task(rows=rows, way=way, ranks=ranks), *given, engine, workers=2)
        assert done.code == 0, done.err
    auto, fixed = wounded.folder / "auto", wounded.folder / "set"
    probes = events(auto, "probe")
    assert max(probe["micro"] for probe in probes if probe["fits"]) == 5
    assert ledger(auto) == {**ledger(fixed), "probe": 2 * sum(probe["micro"] for probe in probes)}
    states = [weights_of(run).state for run in (auto, fixed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_auto_leaves_no_trace_in_zeros_optimizer_either(wounded: Commands) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    given = ("optimizer={kind: adamw}", "lr.base=0.01")
    for name, micro in (("auto", "auto"), ("set", "5")):
        engine = f"engine={{kind: deepspeed, zero: 2, max_micro: {micro}}}"
        assert wounded.train(name, *task(rows=5), *given, engine, workers=2).code == 0
    losses = [[step["loss"] for step in events(wounded.folder / name, "step")] for name in ("auto", "set")]
    assert losses[0] == losses[1]
    refused = wounded.train("no", *task(rows=5), "engine={kind: deepspeed, zero: 3, max_micro: auto}")
    assert refused.code == 2
    assert "max_micro=auto cannot be measured with zero=3" in refused.err


@pytest.mark.slow
def test_auto_is_not_measured_again_on_resume(wounded: Commands) -> None:
    arguments = (*task(rows=5), "engine.max_micro=auto", "run.checkpoint.every_steps=5")
    assert wounded.train("run", *arguments, workers=2).code == 0
    probes = len(events(wounded.folder / "run", "probe"))
    assert wounded.train("run", *arguments, resume=True, workers=2).code == 0
    assert len(events(wounded.folder / "run", "probe")) == probes
