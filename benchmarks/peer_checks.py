"""What a peer's training did, told from the lines that its watch has written, against what had been asked for."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peer_loops.work import Work
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

EXACT = 1e-4  #: relative distance of a float32 gradient from the exact mean that summing in another order may make


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update of all ranks together."""

    moment: float  #: seconds, on the first rank's clock
    rows: int
    lr: float
    samples: tuple[int, ...] = ()  #: indices, where the work is exact
    distance: float = 0.0  #: of the gradient from the mean over these samples, relative; where the work is exact


def read(work: Work, world: int) -> tuple[list[Update], int]:
    """All updates that the ranks have written down, in order, and the evaluations that are in none of them."""
    files = [work.folder / f"seen-{rank}.jsonl" for rank in range(world)]
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    beside = sum(line["beside"] for lines in ranks for line in lines)
    made = [[line for line in lines if line["rows"]] for lines in ranks]
    return list(_together(work, list(zip(*made, strict=False)))), beside


def _together(work: Work, lines: Sequence[tuple[dict[str, Any], ...]]) -> Iterator[Update]:
    inputs, _ = work.data.tensors
    index = {float(row.flatten()[0]): number for number, row in enumerate(inputs)} if work.exact else {}
    for ranks in lines:
        samples = tuple(index[value] for rank in ranks for value in rank.get("seen", ()))
        yield Update(
            moment=ranks[0]["moment"],
            rows=sum(rank["rows"] for rank in ranks),
            lr=ranks[0]["lr"],
            samples=samples,
            distance=distance(work, ranks[0], samples) if work.exact else 0.0,
        )


def distance(work: Work, line: dict[str, Any], samples: Sequence[int]) -> float:
    """‖g − ∇‖/‖∇‖ of the gradient that was applied, ∇ the mean over the samples at the same parameters."""
    model = work.make()
    vector_to_parameters(torch.tensor(line["before"]), model.parameters())
    exact = _gradient(work, model, list(samples))
    return float((torch.tensor(line["gradient"]) - exact).norm() / exact.norm())


def _gradient(work: Work, model: nn.Module, samples: list[int]) -> Tensor:
    inputs, labels = work.data.tensors
    loss = work.loss(model, (inputs[samples], labels[samples]))
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a training did that nobody asked for."""

    updates: int
    batches: str  #: updates of another batch than asked for
    gradients: str  #: updates whose gradient is not the mean over their samples
    seen: str  #: samples that were not in one update of every epoch
    beside: int  #: gradient evaluations that are in no update
    evaluations: int  #: gradient evaluations in updates

    @classmethod
    def of(cls, work: Work, done: Sequence[Update], beside: int) -> "Check":
        """From all updates of a whole training."""
        off = [update.distance for update in done if update.distance > EXACT]
        return cls(
            updates=len(done),
            batches=_odd(work, done),
            gradients=f"{len(off)}, off by up to {max(off):.0%}" if off else "none",
            seen=times_seen(work, done),
            beside=beside,
            evaluations=sum(update.rows for update in done),
        )


def _odd(work: Work, done: Sequence[Update]) -> str:
    """How many updates have which batch that was not asked for where they are."""
    found, before = Counter[int](), 0
    for update in done:
        wanted = work.batch_of(min(work.epochs - 1, before // len(work.data)))
        found[update.rows] += update.rows != wanted
        before += update.rows
    odd = [f"{times} of {rows}" for rows, times in sorted(found.items()) if times]
    return ", ".join(odd) or "none"


def times_seen(work: Work, done: Sequence[Update]) -> str:
    """How many samples were in more or fewer updates than there are epochs; if none, how often one was in no epoch's.

    Epochs can be told apart only where each sample comes as often as it should: they then have as many samples.
    """
    seen = [sample for update in done for sample in update.samples]
    counts, size = Counter(seen), len(work.data)
    times = [counts[sample] for sample in range(size)]
    if wrong := sum(time != work.epochs for time in times):
        return f"{wrong}, {min(times)} to {max(times)} times"
    missed = sum(size - len(set(seen[first : first + size])) for first in range(0, len(seen), size))
    return f"{missed} in another epoch" if missed else "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """What was different of a training that died and was resumed."""

    rates: str  #: updates whose learning rate is not that of the undisturbed training
    seen: str  #: as in Check
    lost: int  #: updates that were made again

    @classmethod
    def of(cls, work: Work, whole: Sequence[Update], both: Sequence[Update], died: int) -> "Resumption":
        """`both`: the `died` updates before the kill, then those that the resumed process made."""
        resumed = both[died:]
        kept = both[: max(0, len(whole) - len(resumed))]
        pairs = zip(resumed[::-1], whole[::-1], strict=False)
        wrong = sum(abs(update.lr / same.lr - 1) > 1e-6 for update, same in pairs)
        return cls(
            rates=f"{wrong} updates" if wrong else "none",
            seen=times_seen(work, [*kept, *resumed]),
            lost=died - len(kept),
        )
