"""Puzzles: every row obeys its rule, test sets have multisets of their own, and the tokens hide nothing else."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distgrow.core.errors import ConfigError
from distgrow.core.order import Int64s
from distgrow.data.raven import BLANK, RULES, Puzzles, multisets
from distgrow.tasks.architectures import GPT, MLP
from distgrow.tasks.raven import Raven

#: Rule → what a row of three values must fulfil. The last one is checked over the rows of a puzzle, too.
FULFILS = (
    lambda a, b, c: a == b == c,
    lambda a, b, c: ((b - a) % 8, (c - b) % 8) == (1, 1),
    lambda a, b, c: ((b - a) % 8, (c - b) % 8) == (2, 2),
    lambda a, b, c: ((b - a) % 8, (c - b) % 8) == (7, 7),
    lambda a, b, c: ((b - a) % 8, (c - b) % 8) == (6, 6),
    lambda a, b, c: c == (a + b) % 8,
    lambda a, b, c: c == (a - b) % 8,
    lambda a, b, c: len({a, b, c}) == 3,
)


def puzzles(rows: int = 300, features: int = 4, *, held: bool = False, shuffled: bool = True) -> Puzzles:
    return Puzzles(rows, multisets(features, 0.25, seed=0)[held], seed=5, shuffled=shuffled)


def drawn(data: Puzzles) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the grids as they are shown, answers filled in: (puzzles, row, column, place); and the answers."""
    tokens, answers = data.batch(np.arange(len(data)), np.zeros(len(data), np.uint64))
    features = answers.shape[1]
    assert (tokens[:, -features:] == BLANK).all()
    assert int(tokens[:, :-features].max()) < BLANK
    whole = torch.cat([tokens[:, :-features], answers], dim=1)
    return whole.view(-1, 3, 3, features).numpy(), answers.numpy()


def test_there_are_330_multisets_of_which_82_are_held_out() -> None:
    known, held = multisets(4, 0.25, seed=0)
    every = {tuple(rules) for rules in [*known.tolist(), *held.tolist()]}
    assert (len(known), len(held), len(every)) == (248, 82, 330)
    assert every == {tuple(sorted(rules)) for rules in itertools.product(range(8), repeat=4)}
    for features in (1, 2, 3, 5):
        assert sum(map(len, multisets(features, 0.25, seed=0))) == math.comb(RULES + features - 1, features)


def test_every_row_of_every_puzzle_obeys_its_rules_once_its_columns_are_put_back() -> None:
    data = puzzles()
    shown, _ = drawn(data)
    made = data.made(np.arange(len(data)))
    met = set[int]()
    for grid, rules, columns in zip(shown, made.rules, made.columns, strict=True):
        back = np.empty_like(grid)
        for column in range(3):
            back[:, column, columns[column]] = grid[:, column]
        for feature, rule in enumerate(rules.tolist()):
            met.add(rule)
            lines = back[:, :, feature].tolist()
            assert all(FULFILS[rule](*line) for line in lines)
            assert rule < 7 or len({frozenset(line) for line in lines}) == 1  # the same three values in each row
    assert met == set(range(8))


def test_places_differ_from_column_to_column_and_are_the_same_in_all_rows() -> None:
    columns = puzzles().made(np.arange(300)).columns
    assert (np.sort(columns, axis=2) == np.arange(4)).all()
    assert len({tuple(order) for order in columns[:, 0].tolist()}) == 24
    assert (columns[:, 0] != columns[:, 2]).any(1).mean() == pytest.approx(23 / 24, abs=0.05)
    plain = puzzles(shuffled=False)
    assert (plain.made(np.arange(300)).columns == np.arange(4)).all()


def test_puzzles_have_the_multisets_of_their_set_alone_and_all_of_them() -> None:
    for held in (False, True):
        rules: Int64s = puzzles(6000, held=held).made(np.arange(6000)).rules
        mine = {tuple(each) for each in multisets(4, 0.25, seed=0)[held].tolist()}
        assert {tuple(each) for each in rules.tolist()} == mine


def test_values_are_even_and_every_puzzle_follows_from_its_number_alone() -> None:
    data = puzzles(4000)
    shown, _ = drawn(data)
    shares = np.bincount(shown.flatten(), minlength=8) / shown.size
    assert shares == pytest.approx([1 / 8] * 8, abs=0.005)
    some = np.array([7, 3999, 7, 12])
    tokens, answers = data.batch(some, np.arange(4).astype(np.uint64))
    for number, index in enumerate(some.tolist()):
        assert torch.equal(data[index][0], tokens[number])
        assert torch.equal(data[index][1], answers[number])
    assert not np.array_equal(shown[0], shown[1])


def test_the_answer_follows_from_the_first_two_rows_and_what_is_left_of_the_last() -> None:
    """With one feature: whatever rules the first two rows fit, one of them gives the answer."""
    shown, answers = drawn(Puzzles(400, multisets(1, 0.25, seed=0)[0], seed=5))
    for grid, answer in zip(shown[..., 0].tolist(), answers[:, 0].tolist(), strict=True):
        fits = [rule for rule in range(8) if all(FULFILS[rule](*line) for line in grid[:2])]
        assert any(FULFILS[rule](grid[2][0], grid[2][1], answer) for rule in fits)


def test_the_task_is_right_only_if_all_features_are() -> None:
    task = Raven(rows=20, test=10, features=2).build(GPT(layers=1, width=8, heads=2))
    tokens, answers = task.test.batch(np.arange(10), np.zeros(10, np.uint64))

    class Given(torch.nn.Module):
        """Answers right but for the second feature of the first four puzzles."""

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            wrong = answers.clone()
            wrong[:4, 1] = (wrong[:4, 1] + 1) % 8
            logits = torch.zeros(*batch.shape, 9)
            logits[:, -2:, :8] = 50 * torch.nn.functional.one_hot(wrong, 8)
            logits[..., 8] = 1000.0  # a blank is no answer
            return logits

    assert task.metrics is not None
    found = task.metrics(Given(), (tokens, answers))
    assert float(found["accuracy"]) == pytest.approx(0.6)
    assert float(found["feature_accuracy"]) == pytest.approx(0.8)


def test_every_token_sees_the_whole_grid() -> None:
    task = Raven(rows=20, features=2).build(GPT(layers=1, width=8, heads=2))
    tokens = task.train.batch(np.arange(1), np.zeros(1, np.uint64))[0]
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 8
    assert not torch.equal(task.model(tokens)[0, 0], task.model(changed)[0, 0])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"held_out=0\.1 of 8 multisets is less than one"):
        Raven(features=1, held_out=0.1).build(None)
    with pytest.raises(ConfigError, match=r"model\.kind=mlp needs images"):
        Raven().build(MLP())
