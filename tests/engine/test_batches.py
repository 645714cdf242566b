"""Batches of any layout: their rows are those that were drawn, and what a collation drops is still seen."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import parameters
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

from distgrow import RunSpec, Torch, budget, constant, constant_lr, fit
from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.engine.batches import check_rows, drawn_rows, map_leaves
from distgrow.training.spec import Evaluation

DRAW = torch.Generator().manual_seed(0)
ROWS = [(torch.randn(int(n), 5, generator=DRAW), int(n) % 2) for n in torch.randint(2, 7, (40,), generator=DRAW)]
Row = tuple[Tensor, int]


class Reader(nn.Module):
    """The mean of a row's steps, through a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(5, 2)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        return self.out(torch.stack([sequence.mean(0) for sequence in sequences]))


@dataclass(frozen=True)
class Fields:
    inputs: Any
    labels: Tensor


Named = namedtuple("Named", ["inputs", "labels"])


def labels(rows: list[Row]) -> Tensor:
    return torch.tensor([label for _, label in rows])


def packed(rows: list[Row]) -> PackedSequence:
    return pack_sequence([sequence for sequence, _ in rows], enforce_sorted=False)


def time_first(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([len(sequence) for sequence, _ in rows])
    return pad_sequence([sequence for sequence, _ in rows]), lengths, labels(rows)


def unpacked(sequence: PackedSequence) -> list[Tensor]:
    return nn.utils.rnn.unpack_sequence(sequence)


Layout = tuple[Callable[[list[Row]], Any], Callable[[Any], tuple[list[Tensor], Tensor]]]


def to_float64(leaf: Any) -> Any:
    floating = isinstance(leaf, PackedSequence) or (isinstance(leaf, Tensor) and leaf.is_floating_point())
    return leaf.to(torch.float64) if floating else leaf


LAYOUTS: dict[str, Layout] = {
    "packed": (lambda rows: (packed(rows), labels(rows)), lambda batch: (unpacked(batch[0]), batch[1])),
    "time first": (
        time_first,
        lambda batch: ([batch[0][:n, k] for k, n in enumerate(batch[1])], batch[2]),
    ),
    "lists of tensors": (
        lambda rows: ([sequence for sequence, _ in rows], [torch.tensor(label) for _, label in rows]),
        lambda batch: (batch[0], torch.stack(batch[1])),
    ),
    "a dataclass": (
        lambda rows: Fields(packed(rows), labels(rows)),
        lambda batch: (unpacked(batch.inputs), batch.labels),
    ),
    "a named tuple": (
        lambda rows: Named(packed(rows), labels(rows)),
        lambda batch: (unpacked(batch.inputs), batch.labels),
    ),
    "a scalar first": (
        lambda rows: {"longest": torch.tensor(9), "inputs": packed(rows), "labels": labels(rows)},
        lambda batch: (unpacked(batch["inputs"]), batch["labels"]),
    ),
}


def trained(folder: Path, layout: str, max_micro: int, precision: Any) -> Tensor:
    collate, parts = LAYOUTS[layout]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        sequences, wanted = parts(batch)
        return nn.functional.cross_entropy(model(sequences), wanted)

    engine = Torch(max_micro=max_micro, precision=precision)
    fit(
        Reader(), loss, ROWS, test=ROWS[:7], collate=collate, growth=constant(11), lr=constant_lr(0.3), engine=engine,
        budget=budget(epochs=2), run=RunSpec(dir=str(folder), eval=Evaluation(rows=3)),
    )  # fmt: skip
    return parameters(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_batches_of_every_layout_train_to_the_same_parameters(layout: str, precision: str, tmp_path: Path) -> None:
    wanted = trained(tmp_path / "packed", "packed", 11, precision)
    tolerance = 1e-12 if precision == "float64" else 1e-5
    for micro in (11, 4, 1):
        torch.testing.assert_close(
            trained(tmp_path / f"{micro}", layout, micro, precision), wanted, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_in_a_batch_is_changed_and_its_nesting_kept(layout: str) -> None:
    collate, parts = LAYOUTS[layout]
    batch = collate(ROWS[:4])
    moved = map_leaves(to_float64, batch)
    assert type(moved) is type(batch)
    for one, other in zip(parts(batch)[0], parts(moved)[0], strict=True):
        assert other.dtype == torch.float64
        assert torch.equal(one.double(), other)


def test_a_packed_sequence_keeps_its_lengths_when_it_is_moved() -> None:
    moved = map_leaves(to_float64, packed(ROWS[:4]))
    assert moved.data.dtype == torch.float64
    assert moved.batch_sizes.dtype == torch.int64


@pytest.mark.parametrize("rows", [4, 6, 1])
def test_rows_that_a_collation_drops_or_adds_are_refused(rows: int) -> None:
    for batch in (
        (torch.zeros(rows, 3), torch.zeros(rows)),
        {"x": torch.zeros(rows, 3), "text": ["word"] * rows},
        [Fields(torch.zeros(rows, 7, 2), torch.zeros(rows))],
    ):
        with pytest.raises(ConfigError, match=f"a micro-batch has {rows} rows? where the plan has 5"):
            check_rows(batch, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_no_layout_is_taken_for_a_wrong_number_of_rows(layout: str, rows: int) -> None:
    check_rows(LAYOUTS[layout][0](ROWS[:rows]), rows)


def test_the_rows_of_micro_batches_are_those_of_the_plan() -> None:
    plan = Plan(batch=11, world=2, micro=2, accum=3, lr=0.1, stage=0)
    for rank in (0, 1):
        counts = [len(positions) for positions in plan.rows(0, rank)]
        batches = [torch.zeros(count, 3) for count in counts]
        assert [rows for _, rows in drawn_rows(plan, rank, batches)] == counts
