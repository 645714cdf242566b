"""Whether a loss is a mean over rows, which exact updates need; knows neither tasks nor trainers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.data.seeding import kept_generators, seed_generators
from distgrow.data.stream import SampleStream
from distgrow.engine.batches import Loss, check_rows, leaves_of
from distgrow.engine.trial_rows import ROWS, Rows, draw, placed, unchanged

#: Rows of the first of two parts of a pass.
FIRST = 3
#: Pairs of rows and groups of rows that are tried.
PAIRS, GROUPS = 6, 2
#: Seeds over which the loss is averaged if it draws random numbers, and the share by which it may then be off.
DRAWS, COARSE = 8, 0.3

#: The loss of rows at a seed, or None if it is no finite number.
LossOf = Callable[[Rows, int], float | None]


def check_mean_over_rows(
    model: nn.Module, loss: Loss, stream: SampleStream, *, most: int = ROWS, workers: int = 0
) -> None:
    """Check the loss of a few rows against the losses of parts and of repetitions of them, in eval mode.

    A mean over rows is one at all parameters. The check is therefore made at parameters that are moved at random:
    at the first ones all rows may have the same loss. Nothing is decided about a loss that fails in eval mode, is not
    finite or is no number, or about fewer than two rows. The model is left as it was.

    Args:
        model: The model.
        loss: (model, batch) → loss.
        stream: The training set, whose first positions are drawn.
        most: Rows of a pass, at most; a pass has two even if this is 1.
        workers: Loader processes, of which one is used if there are any.

    Raises:
        ConfigError: The loss is no mean over rows, or the collation adds or drops some.
    """
    total = len(stream.dataset)
    if total < 2:
        return
    trials = Trials.of(total, most)
    drawn = draw(stream, trials.batches(), workers)
    for rows, batch in drawn.items():
        check_rows(batch, len(rows))
    device = next(model.parameters(), torch.empty(0)).device
    with kept_generators(device), _moved(model):
        trials.check(_losses(model, loss, drawn), _tolerance(model), ragged=_ragged(drawn, trials))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """Hold the rows that are tried.

    A pair is tried with either of its rows repeated. All three batches are padded alike, so a model may see padding. A
    group is tried with two parts of it, which shows more, but is strict only if no row is padded.
    """

    pairs: list[Rows]
    groups: list[Rows]
    copies: int

    @classmethod
    def of(cls, total: int, most: int) -> "Trials":
        """Return the trials of a data set of `total` rows with at most `most` rows a pass, but three."""
        size = min(max(2, most), total)
        pairs = [(k, k + 1) for k in range(0, min(2 * PAIRS, total - 1), 2)]
        groups = [tuple(range(k, k + size)) for k in range(0, min(GROUPS * size, total // size * size), size)]
        return cls(pairs=pairs, groups=groups, copies=max(2, most - 1))

    def repeated(self, pair: Rows) -> tuple[Rows, Rows]:
        """Return the pair with its first row repeated, and with its second."""
        return (pair[0],) * self.copies + pair[1:], pair[:1] + (pair[1],) * self.copies

    def batches(self) -> list[Rows]:
        """Return all that is tried."""
        pairs = [rows for pair in self.pairs for rows in (pair, *self.repeated(pair))]
        return list(dict.fromkeys(pairs + [rows for group in self.groups for rows in (group, *parts_of(group))]))

    def check(self, loss_of: LossOf, tolerance: float, *, ragged: bool) -> None:
        """Raise ConfigError if a loss is no mean; `ragged` if rows are padded to the longest of a batch."""
        whole, again = loss_of(self.groups[0], 0), loss_of(self.groups[0], 1)
        if whole != again:
            return self._check_parts(self.groups[0], loss_of, COARSE, range(DRAWS))
        for pair in self.pairs:
            losses = [loss_of(rows, 0) for rows in (pair, *self.repeated(pair))]
            _check_pair([loss for loss in losses if loss is not None], self.copies, tolerance)
        for group in self.groups:
            self._check_parts(group, loss_of, COARSE if ragged else tolerance, range(1))
        return None

    def _check_parts(self, group: Rows, loss_of: LossOf, tolerance: float, seeds: range) -> None:
        losses = [(len(rows), _mean(loss_of, rows, seeds)) for rows in (group, *parts_of(group))]
        (rows, whole), (one, first), (other, second) = losses
        if (
            whole is None
            or first is None
            or second is None
            or is_mean(whole, [(one, first), (other, second)], tolerance)
        ):
            return
        seen = f"{whole:.6g} for {rows} samples, but {first:.6g} and {second:.6g} for {one} and {other} of them"
        raise ConfigError(_refusal(seen, is_sum=math.isclose(whole, first + second, rel_tol=0.03)))


def _check_pair(losses: list[float], copies: int, tolerance: float) -> None:
    if len(losses) < 3 or is_mean(losses[0], [(1, losses[1]), (1, losses[2])], tolerance):
        return
    whole, first, second = losses
    seen = f"{whole:.6g} for two samples, but {first:.6g} and {second:.6g} with one of them repeated {copies} times"
    raise ConfigError(_refusal(seen, is_sum=math.isclose(first + second, (copies + 1) * whole, rel_tol=0.03)))


def parts_of(group: Rows) -> tuple[Rows, Rows]:
    """Return two parts of a group, of different sizes if it has more than two rows."""
    cut = max(1, min(FIRST, (len(group) - 1) // 2))
    return group[:cut], group[cut:]


def is_mean(whole: float, parts: list[tuple[int, float]], tolerance: float) -> bool:
    """Return whether a loss is the mean of its parts, given as (rows, loss), up to a relative tolerance."""
    mean = math.fsum(rows * loss for rows, loss in parts) / sum(rows for rows, _ in parts)
    scale = max(abs(whole), *(abs(loss) for _, loss in parts))
    return abs(whole - mean) <= tolerance * scale


def _refusal(seen: str, *, is_sum: bool) -> str:
    way_out = (
        "it is their sum: divide it by the number of rows"
        if is_sum
        else "a mean over tokens or labels, by class weights or over pairs of rows is none: take the mean of each row "
        "first, then the mean over the rows (with weights: the sum of weight × loss, divided by the number of rows)"
    )
    return (
        f"the loss is no mean over samples: at trial parameters it is {seen}, so training would depend on "
        f"engine.max_micro and the number of ranks; return the mean over the rows of the batch: {way_out}"
    )


def _mean(loss_of: LossOf, rows: Rows, seeds: range) -> float | None:
    losses = [loss for seed in seeds if (loss := loss_of(rows, seed)) is not None]
    return math.fsum(losses) / len(losses) if len(losses) == len(seeds) else None


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
