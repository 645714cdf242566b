"""Runs whose updates sample their rows: drawn alike by every loader, resumed bit for bit, and counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data

from distgrow import (
    ConfigError,
    Controller,
    Mixture,
    RunSpec,
    Schedule,
    budget,
    constant,
    every,
    exponential,
    fit,
    nice_sampling,
    partition_sampling,
    stratified_sampling,
)
from distgrow.core.noise_stats import Measured
from distgrow.core.progress import Outcome, Progress
from distgrow.core.sampling import SamplingSpec
from distgrow.core.stages import MinStage
from distgrow.data.loader import DirectLoader, Loader, PrefetchingLoader
from distgrow.data.stream import SampledStream
from distgrow.growth import Growth
from distgrow.growth.progress_test import ProgressTest
from distgrow.integrations.session import GrowthSession

N = 60
KINDS = {"nice": nice_sampling(), "partition": partition_sampling(3), "stratified": stratified_sampling([10, 20, 30])}


class Numbered(torch.utils.data.Dataset[Any]):
    """Rows that are their own numbers, with a random number each."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, float(torch.rand(()))], dtype=torch.double)


def control(sampling: SamplingSpec, world: int = 1, max_micro: int = 64, growth: Growth | None = None) -> Controller:
    """Three stages, unless growth measures."""
    growth = growth or exponential(4, 2, 16)
    own: dict[str, Any] = {} if growth.sets_stages else {"stages": every(samples=40)}
    own |= {"growth": growth, "budget": budget(samples=170), "epoch": N}
    return Controller(**own, world=world, max_micro=max_micro, sampling=sampling)


def drawn(loaders: list[Loader], control: Controller, skip: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """What every update draws over all ranks; those numbered in `skip` are not applied."""
    progress, found, update = Progress(), list[torch.Tensor](), 0
    while not control.done(progress):
        progress = control.advance(progress)
        plan = control.plan(progress)
        found.append(torch.cat([batch for loader in loaders for batch in loader.draw(progress, plan)]))
        assert len(found[-1]) == plan.batch
        outcome = Outcome(applied=update not in skip, measured=Measured(product=-1.0))
        progress, update = control.after(progress, plan, outcome), update + 1
    return found


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two runs drew the same."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_depend_on_neither_ranks_nor_micro_batches_nor_loader_processes(kind: str) -> None:
    sampling, stream = KINDS[kind], SampledStream(Numbered(), KINDS[kind], seed=3)
    one = drawn([DirectLoader(stream, 0)], control(sampling), skip=(2, 3))
    for world, max_micro in [(2, 64), (3, 2), (4, 3)]:
        ranks: list[Loader] = [DirectLoader(stream, rank) for rank in range(world)]
        assert equal(drawn(ranks, control(sampling, world, max_micro), skip=(2, 3)), one)
    own = control(sampling, max_micro=3)
    ahead = PrefetchingLoader(stream, 0, own, workers=2, prefetch=2, pin=False)
    assert equal(drawn([ahead], own, skip=(2, 3)), one)
    for batch in one:
        rows = batch[:, 0].tolist()
        assert len(set(rows)) == len(rows)
        if kind == "partition":
            assert len({int(row) // 20 for row in rows}) == 1


def test_a_batch_that_grows_unforeseen_is_drawn_ahead_in_vain_and_drawn_again_right() -> None:
    growth = ProgressTest(start=4, cap=16, min_stage=MinStage(updates=3))
    sampling, stream = nice_sampling(), SampledStream(Numbered(), nice_sampling(), seed=3)
    own = control(sampling, growth=growth)
    direct = drawn([DirectLoader(stream, 0)], own)
    assert len({len(batch) for batch in direct}) > 1
    ahead = PrefetchingLoader(stream, 0, own, workers=1, prefetch=3, pin=False)
    assert equal(drawn([ahead], own), direct)


def regression(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """A mean over rows."""
    return ((model(batch[:, :1] / N) - batch[:, 1:]) ** 2).mean()


def trained(folder: Path, name: str, samples: int, sampling: SamplingSpec | None, **more: Any) -> Any:
    """A linear model's parameters after a run, and the run's result."""
    torch.manual_seed(1)
    model = torch.nn.Linear(1, 1).double()
    result = fit(
        model, regression, Numbered(), growth=exponential(4, 2, 16), stages=every(samples=40),
        budget=budget(samples=samples), sampling=sampling, run=RunSpec(dir=str(folder / name)), **more,
    )  # fmt: skip
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), result


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_and_counts_every_sample(kind: str, tmp_path: Path) -> None:
    whole, result = trained(tmp_path, "whole", 400, KINDS[kind])
    assert result.progress.ledger.applied == result.progress.ledger.total == result.progress.samples == 400
    trained(tmp_path, "parts", 112, KINDS[kind])
    resumed, result = trained(tmp_path, "parts", 400, KINDS[kind], resume=True)
    assert torch.equal(whole, resumed)
    assert result.progress.ledger.total == 400
    other, _ = trained(tmp_path, "shuffled", 400, None)
    assert not torch.equal(whole, other)


def test_a_resume_with_another_sampling_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "run", 112, nice_sampling())
    with pytest.raises(ConfigError, match="sampling"):
        trained(tmp_path, "run", 400, None, resume=True)


def test_a_data_set_with_an_order_of_its_own_and_a_stream_are_refused(tmp_path: Path) -> None:
    class Lines(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([torch.zeros(2).double()] * N)

        def __len__(self) -> int:
            return N

    for dataset, name in ((Mixture([(Numbered(), 1.0)]), "Mixture"), (Lines(), "Lines")):
        with pytest.raises(ConfigError, match=f"the training set is {name}, which has an order of its own"):
            fit(
                torch.nn.Linear(1, 1).double(), regression, dataset, growth=constant(4), budget=budget(samples=8),
                sampling=nice_sampling(), run=RunSpec(dir=str(tmp_path / "run")),
            )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_under_another_trainer_updates_sample_their_rows_too() -> None:
    sampling = stratified_sampling(3)
    schedule = Schedule(growth=constant(6), budget=budget(samples=12), sampling=sampling)
    session, model = GrowthSession(schedule.controller(N), Numbered()), torch.nn.Linear(1, 1).double()
    for update in range(2):
        plan = session.begin(model)
        rows = torch.cat([batch[:, 0] for batch, _, _ in session.draw(plan)])
        assert rows.tolist() == sampling.rows(N, 0, 6 * update, 6, np.arange(6)).tolist()
        assert sorted(int(row) // 20 for row in rows) == [0, 0, 1, 1, 2, 2]
        session.end(plan, model.parameters())
