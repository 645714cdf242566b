"""Metrics of a test set that several ranks share in batches: exact means, or a refusal with the metric's name."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.engine.metrics import means

Row = tuple[int, bool]  # class, whether the guess is right
ROWS = st.lists(st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=4), max_size=4), min_size=1)


@dataclass(frozen=True)
class Heard(World):
    """A rank that has heard what all ranks gather; without that it keeps what it would say."""

    ranks: list[Any] = field(default_factory=list)
    said: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.said.append(value)
        return self.ranks or [value]


def over_ranks(metrics: Callable[[Any], Any], ranks: list[list[list[Row]]]) -> list[dict[str, float] | ConfigError]:
    """What every rank comes to, each with its own batches."""
    said: list[Any] = []
    for batches in ranks:
        alone = Heard()
        with suppress(ConfigError):  # it may have what others lack
            means(metrics, [(batch, len(batch)) for batch in batches], alone)
        said += alone.said
    found: list[Any] = []
    for batches in ranks:
        try:
            found.append(means(metrics, [(batch, len(batch)) for batch in batches], Heard(ranks=said)))
        except ConfigError as error:
            found.append(error)
    return found


def counted(batch: list[Row]) -> dict[str, Any]:
    """Accuracy as a mean over rows, and recalls as pairs that batches without the class lack."""
    values: dict[str, Any] = {"accuracy": torch.tensor([float(right) for _, right in batch]).mean()}
    for kind in {kind for kind, _ in batch}:
        rights = [right for other, right in batch if other == kind]
        values[f"recall_{kind}"] = (torch.tensor(sum(rights)), len(rights))
    return values


@given(ROWS)
def test_pairs_and_means_are_those_of_all_rows_on_every_rank(ranks: list[list[list[Row]]]) -> None:
    rows = [row for batches in ranks for batch in batches for row in batch]
    for found in over_ranks(counted, ranks):
        assert isinstance(found, dict)
        assert set(found) == ({"accuracy"} if rows else set()) | {f"recall_{kind}" for kind, _ in rows}
        for name, value in found.items():
            chosen = [right for kind, right in rows if name in ("accuracy", f"recall_{kind}")]
            assert value == pytest.approx(sum(chosen) / len(chosen))


def plain(batch: list[Row]) -> dict[str, Any]:
    """Recalls as means, which batches without the class lack."""
    return {name: value[0] / value[1] if isinstance(value, tuple) else value for name, value in counted(batch).items()}


@given(ROWS)
def test_a_mean_that_some_batches_lack_is_refused_on_every_rank_by_its_name(ranks: list[list[list[Row]]]) -> None:
    kinds = [{kind for kind, _ in batch} for batches in ranks for batch in batches if batch]
    lacking = {f"recall_{kind}" for had in kinds for kind in had if not all(kind in others for others in kinds)}
    found = over_ranks(plain, ranks)
    assert len({str(value) for value in found}) == 1
    for error in found:
        assert isinstance(error, ConfigError) == bool(lacking)
        assert not lacking or all(name in str(error) for name in lacking)


def test_a_count_of_nothing_has_no_mean() -> None:
    assert str(means(lambda _: {"recall": (0, 0)}, [(None, 3)], World())) == "{'recall': nan}"


def test_a_batch_that_repeats_a_row_does_not_count() -> None:
    found = means(lambda batch: {"x": float(batch), "pair": (batch, 2), **({"more": 1.0} if batch == 9 else {})},
                  [(1, 2), (4, 1), (9, 0)], World())  # fmt: skip
    assert found == {"pair": 5 / 4, "x": 2.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor(1.0), "the metrics are a Tensor; return a dict"),
        ({"hits": torch.zeros(3)}, r"'hits' has shape \(3,\)"),
        ({"hits": (1, 2, 3)}, "'hits' has 3 values"),
        ({"hits": "many"}, "'hits' is a str; it must be a number"),
        ({"hits": None}, "'hits' is a NoneType"),
    ],
)
def test_what_is_no_metric_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        means(lambda _: values, [(None, 3)], World())


def test_a_metric_is_a_number_or_a_pair_throughout() -> None:
    with pytest.raises(ConfigError, match="'hits' is a number in some batches and a pair in others"):
        means(lambda batch: {"hits": batch}, [((1, 2), 3), (0.5, 3)], World())


def test_an_error_of_one_rank_is_every_ranks() -> None:
    found = over_ranks(lambda batch: {"hits": batch[0][1] if batch[0][0] else "none"}, [[[(1, True)]], [[(0, True)]]])
    assert [str(error) for error in found] == ["the metric 'hits' is a str; it must be a number"] * 2
