"""Whether a loss is a mean over rows or items, which exact updates need; knows neither tasks nor trainers."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.data.seeding import kept_generators, seed_generators
from distgrow.data.stream import Stream
from distgrow.engine.batches import Loss, check_rows, leaves_of
from distgrow.engine.items import Items, count_items
from distgrow.engine.mean_losses import Losses, parts_of, refusal_of
from distgrow.engine.trial_rows import ROWS, Rows, draw, placed, unchanged

#: Pairs of rows and groups of rows that are tried.
PAIRS, GROUPS = 6, 2
#: Pairs of rows that are swapped if the loss draws random numbers.
SWAPPED = 3
#: Seeds over which the loss is averaged if it draws random numbers, and the share by which it may then be off.
DRAWS, COARSE = 8, 0.3

#: The loss of rows at a seed, or None if it is no finite number.
LossOf = Callable[[Rows, int], float | None]


def check_mean_over_rows(
    model: nn.Module,
    loss: Loss,
    stream: Stream,
    *,
    items: Items | None = None,
    most: int = ROWS,
    workers: int = 0,
    trained: bool = False,
) -> None:
    """Check the loss of a few rows against the losses of parts and of repetitions of them, in eval mode.

    A mean over rows is one at all parameters. The check is therefore made at parameters that are moved at random:
    at the first ones all rows may have the same loss. Nothing is decided about a loss that fails in eval mode, is not
    finite or is no number, or about fewer than two rows. The model is left as it was.

    Args:
        model: The model.
        loss: (model, batch) → loss.
        stream: The training set, whose first positions are drawn.
        items: Counts what the loss is a mean over, if that is not rows.
        most: Rows of a pass, at most; a pass has two even if this is 1.
        workers: Loader processes, of which one is used if there are any.
        trained: Leave the parameters where they are. Losses may then be as small as rounding is.

    Raises:
        ConfigError: The loss is no mean over rows, or over `items`, or the collation adds or drops some.
    """
    total = stream.size
    if total < 2:
        return
    trials = Trials.of(total, most, least=float(trained))
    drawn = draw(stream, trials.batches(), workers)
    for rows, batch in drawn.items():
        check_rows(batch, len(rows))
    device = next(model.parameters(), torch.empty(0)).device
    with kept_generators(device), _in_eval(model) if trained else _moved(model):
        loss_of, ragged = _losses(model, loss, drawn), _ragged(drawn, trials)
        trials.check(loss_of, _counts(items, drawn), _tolerance(model), ragged=ragged)
        if trials.draws_numbers(loss_of) and (ragged or _some_labels_out(drawn)):
            swapped = draw(stream, trials.swaps(), workers)
            trials.check_swaps(_losses(model, loss, swapped), _counts(items, swapped), _tolerance(model))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """Hold the rows that are tried.

    A pair is tried with either of its rows repeated. All three batches are padded alike, so a model may see padding. A
    group is tried with two parts of it, which shows more, but is strict only if no row is padded.
    """

    pairs: list[Rows]
    groups: list[Rows]
    copies: int
    least: float = 0.0  #: losses are compared as if they were at least so large

    @classmethod
    def of(cls, total: int, most: int, least: float) -> "Trials":
        """Return the trials of a data set of `total` rows with at most `most` rows a pass, but three."""
        size = min(max(2, most), total)
        pairs = [(k, k + 1) for k in range(0, min(2 * PAIRS, total - 1), 2)]
        groups = [tuple(range(k, k + size)) for k in range(0, min(GROUPS * size, total // size * size), size)]
        return cls(pairs=pairs, groups=groups, copies=max(2, most - 1), least=least)

    def repeated(self, pair: Rows) -> tuple[Rows, Rows]:
        """Return the pair with its first row repeated, and with its second."""
        return (pair[0],) * self.copies + pair[1:], pair[:1] + (pair[1],) * self.copies

    def batches(self) -> list[Rows]:
        """Return all that is tried."""
        pairs = [rows for pair in self.pairs for rows in (pair, *self.repeated(pair))]
        return list(dict.fromkeys(pairs + [rows for group in self.groups for rows in (group, *parts_of(group))]))

    def check(self, loss_of: LossOf, counts: Mapping[Rows, float] | None, tolerance: float, *, ragged: bool) -> None:
        """Raise ConfigError if a loss is no mean over rows, or over what `counts` counts.

        Args:
            loss_of: The loss of rows at a seed.
            counts: The items of each batch; None: its rows are counted.
            tolerance: Relative, of the loss.
            ragged: Whether rows are padded to the longest of a batch.
        """
        if self.draws_numbers(loss_of):
            return self._check(Losses(self.groups[0], parts_of(self.groups[0]), counts), loss_of, COARSE, range(DRAWS))
        for pair in self.pairs:
            self._check(Losses(pair, self.repeated(pair), counts), loss_of, tolerance, range(1))
        for group in self.groups:
            parts = Losses(group, parts_of(group), counts)
            self._check(parts, loss_of, COARSE if ragged else tolerance, range(1))
        return None

    def draws_numbers(self, loss_of: LossOf) -> bool:
        """Return whether the loss of the same rows differs with the seed."""
        return loss_of(self.groups[0], 0) != loss_of(self.groups[0], 1)

    def swaps(self) -> list[Rows]:
        """Return, for each pair a, b, the batches aaab, abab, baab and bbab: all are padded alike."""
        pairs = self.pairs[:SWAPPED]
        return [(x, y, a, b) for a, b in pairs for x in (a, b) for y in (a, b)]

    def check_swaps(self, loss_of: LossOf, counts: Mapping[Rows, float] | None, tolerance: float) -> None:
        """Check a loss that draws random numbers, which are the same ones in batches of one shape at one seed.

        A sum over rows, or the mean times its divisor, then adds up: what the first row changes is the same whatever
        the second one is.

        Raises:
            ConfigError: The loss is no mean over rows, or over what `counts` counts.
        """
        swaps = self.swaps()
        for quad in (swaps[k : k + 4] for k in range(0, len(swaps), 4)):
            losses = [loss_of(rows, 0) for rows in quad]
            sums = [
                x * (4 if counts is None else counts[rows])
                for x, rows in zip(losses, quad, strict=True)
                if x is not None
            ]
            if len(sums) == 4 and abs(sums[0] - sums[1] - sums[2] + sums[3]) > tolerance * max(map(abs, sums)):
                seen = ", ".join(f"{loss:.6g}" for loss in losses if loss is not None)
                seen = f"{seen} for aaab, abab, baab and bbab of two samples a and b, with the same random numbers"
                raise ConfigError(refusal_of(seen, is_sum=False, by_items=counts is not None))

    def _check(self, losses: Losses, loss_of: LossOf, tolerance: float, seeds: range) -> None:
        found = [_mean(loss_of, rows, seeds) for rows in losses.all]
        values = [loss for loss in found if loss is not None]
        if len(values) == len(found) and not losses.are_means(values, tolerance, self.least):
            raise ConfigError(losses.refusal(values))


def _mean(loss_of: LossOf, rows: Rows, seeds: range) -> float | None:
    losses = [loss for seed in seeds if (loss := loss_of(rows, seed)) is not None]
    return math.fsum(losses) / len(losses) if len(losses) == len(seeds) else None


def _counts(items: Items | None, drawn: Mapping[Rows, Any]) -> dict[Rows, float] | None:
    return None if items is None else {rows: count_items(items, batch) for rows, batch in drawn.items()}


def _some_labels_out(drawn: Mapping[Rows, Any]) -> bool:
    """Return whether whole numbers of -100 are among the batches: labels that do not count."""
    tensors = (leaf for batch in drawn.values() for leaf in _tensors(batch))
    return any(not leaf.is_floating_point() and bool(leaf.eq(-100).any()) for leaf in tensors)


def _ragged(drawn: dict[Rows, Any], trials: Trials) -> bool:
    """Return whether batches differ in more than their number of rows."""
    shapes = {
        tuple(tuple(-1 if size == len(rows) else size for size in leaf.shape) for leaf in _tensors(drawn[rows]))
        for group in trials.groups
        for rows in (group, *parts_of(group))
    }
    return len(shapes) > 1


def _tensors(batch: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor))


def _losses(model: nn.Module, loss: Loss, drawn: dict[Rows, Any]) -> LossOf:
    """Return the function that computes the loss of rows in `drawn`, in eval mode."""
    device = next(model.parameters(), torch.empty(0)).device

    def loss_of(rows: Rows, seed: int) -> float | None:
        seed_generators(seed, device)
        try:
            with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
                value: Any = loss(model, placed(drawn[rows], model))
        except Exception:  # whatever a user's code raises in eval mode: the first update shows what is wrong
            return None
        if not isinstance(value, Tensor) or value.numel() != 1:
            return None  # check_first_rows refuses it
        return value.item() if bool(value.isfinite()) else None

    return loss_of


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; at the end make all as it was."""
    with unchanged(model):
        model.eval()
        yield


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and move its parameters at random; at the end make all as it was."""
    parameters = list({id(parameter): parameter for parameter in model.parameters()}.values())
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with unchanged(model), torch.no_grad():
            model.eval()
            for parameter in filter(_is_inexact, parameters):
                numbers = torch.Generator(parameter.device).manual_seed(parameter.numel())
                noise = torch.randn(parameter.shape, generator=numbers, device=parameter.device)
                parameter.add_(noise.to(parameter.dtype), alpha=_spread(parameter))
            yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _is_inexact(parameter: Tensor) -> bool:
    return (parameter.is_floating_point() or parameter.is_complex()) and parameter.numel() > 0


def _spread(parameter: Tensor) -> float:
    """Return how far the check moves a parameter: as far as a usual initialisation spreads weights."""
    return math.sqrt(parameter.shape[0] / parameter.numel()) if parameter.dim() > 1 else 0.1


def _tolerance(model: nn.Module) -> float:
    """Return the relative tolerance of a loss, for the coarsest numbers that the model computes in."""
    eps = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    return max(1e-4, 3 * max(eps, default=0.0))
