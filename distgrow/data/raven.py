"""Symbolic puzzles after Raven's matrices: grids of 3 × 3 panels, made from a seed as they are drawn; knows no model.

The rules, their number and the split by multisets are those of the generator of SRAVEN (github.com/smonsays/
hypernetwork-attention); the code and the random numbers are this project's own.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distgrow.core.order import Int64s, UInt64s, seeds
from distgrow.data.dataset import Batched

#: Values of a feature, 0 … 7; all arithmetic on them is modulo this.
VALUES = 8
#: The token of what is to be predicted.
BLANK = VALUES
#: Progressions by these steps, of which 0 is the constant; then sum, difference, and three values in any order.
STEPS = (0, 1, 2, -1, -2)
RULES = len(STEPS) + 3
_SIDE = 3
_TRIPLES = np.array(list(itertools.permutations(range(VALUES), _SIDE)))
_ORDERS = np.array(list(itertools.permutations(range(_SIDE))))
_OF_A_FEATURE = 2 * _SIDE  # random numbers


class Made(NamedTuple):
    """Hold puzzles as they are made, before their columns are shuffled."""

    grids: Int64s  #: (puzzles, row, column, feature): each feature follows its rule along every row
    rules: Int64s  #: (puzzles, feature)
    columns: Int64s  #: (puzzles, column, place): the feature that is shown at a place of a column's panels


def multisets(features: int, held_out: float, seed: int) -> tuple[Int64s, Int64s]:
    """Return the multisets of rules to train on and those held out, each (multisets, features).

    There are C(8 + features − 1, features); the share that is held out is rounded down.
    """
    every = np.array(list(itertools.combinations_with_replacement(range(RULES), features)))
    every = every[np.argsort(seeds(seed, np.arange(len(every))))]
    held = int(held_out * len(every))
    return every[held:], every[:held]


class Puzzles(Batched):
    """Puzzles, of which row k is always the same: (tokens, answer), int64 (9·features,) and (features,).

    A token is a feature of a panel, panel after panel; those of the last panel are BLANK. The answer is its features.
    """

    def __init__(self, rows: int, multisets: Int64s, seed: int, *, shuffled: bool = True) -> None:
        """Make no puzzle yet.

        Args:
            rows: Puzzles that there are.
            multisets: The rules that go together, (multisets, features); one is drawn for each puzzle.
            seed: Of all random numbers.
            shuffled: Whether features change places from column to column, in all rows alike.
        """
        self._rows, self._multisets, self._seed, self._shuffled = rows, multisets, seed, shuffled
        self._orders = np.array(list(itertools.permutations(range(multisets.shape[1]))))

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, answers = self.batch(np.array([index]), np.zeros(1, np.uint64))
        return tokens[0], answers[0]

    def batch(self, indices: Int64s, seeds: UInt64s) -> tuple[Tensor, Tensor]:
        """Return the collated puzzles `indices`."""
        made = self.made(indices)
        shown = np.take_along_axis(made.grids, made.columns[:, None], axis=3)
        panels = torch.from_numpy(shown.reshape(len(indices), -1))
        features = made.rules.shape[1]
        tokens, answers = panels.clone(), panels[:, -features:].clone()
        tokens[:, -features:] = BLANK
        return tokens, answers

    def made(self, indices: Int64s) -> Made:
        """Return the puzzles `indices` before their columns are shuffled."""
        features = self._multisets.shape[1]
        each = 1 + _SIDE + _OF_A_FEATURE * features
        numbers = seeds(self._seed, np.asarray(indices)[:, None] * each + np.arange(each))
        rules = self._multisets[_below(numbers[:, 0], len(self._multisets))]
        columns = self._orders[_below(numbers[:, 1 : 1 + _SIDE], len(self._orders) if self._shuffled else 1)]
        values = _by_every_rule(numbers[:, 1 + _SIDE :].reshape(len(numbers), features, _OF_A_FEATURE))
        grids = np.take_along_axis(values, rules[None, :, :, None, None], axis=0)[0]
        return Made(grids=np.moveaxis(grids, 1, 3), rules=rules, columns=columns)


def _by_every_rule(numbers: UInt64s) -> Int64s:
    """Return (rules, puzzles, feature, row, column): what each rule makes of (puzzles, feature, 6) random numbers."""
    first, second = _below(numbers[..., :_SIDE], VALUES), _below(numbers[..., _SIDE:], VALUES)
    lines = [first[..., None] + step * np.arange(_SIDE) for step in STEPS]
    lines += [np.stack([first, second, first + sign * second], axis=-1) for sign in (1, -1)]
    triples = _TRIPLES[_below(numbers[..., 0], len(_TRIPLES))]
    orders = _ORDERS[_below(numbers[..., 1 : 1 + _SIDE], len(_ORDERS))]
    lines.append(np.take_along_axis(triples[..., None, :], orders, axis=-1))
    return np.stack(lines) % VALUES


def _below(numbers: UInt64s, limit: int) -> Int64s:
    return (numbers % np.uint64(limit)).astype(np.int64)
