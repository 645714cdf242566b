"""Matrices that ZeRO's flat shards cut anywhere: which rank has which numbers, and steps of whole ones.

Knows no optimizer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distgrow.distributed.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Hold where the numbers of a matrix lie, row after row."""

    shape: torch.Size
    bounds: tuple[int, ...]  #: rank r has the numbers from bounds[r] to bounds[r + 1]
    offset: int  #: where this rank's begin in its shard

    def size(self, rank: int) -> int:
        """Return how many numbers a rank has."""
        return self.bounds[rank + 1] - self.bounds[rank]

    @property
    def cost(self) -> int:
        """Return the multiplications of a Newton-Schulz step, up to a factor."""
        return self.shape.numel() * min(self.shape)


def one_after_the_other(shapes: Sequence[torch.Size], length: int, world: World) -> list[Cut]:
    """Return the cuts of ZeRO 1 and 2: each rank has `length` numbers of all matrices in a row."""
    found, start = list[Cut](), 0
    for shape in shapes:
        edges = (min(max(rank * length - start, 0), shape.numel()) for rank in range(world.size))
        offset = max(start - world.rank * length, 0)
        found.append(Cut(shape=shape, bounds=(*edges, shape.numel()), offset=offset))
        start += shape.numel()
    return found


def each_by_itself(shapes: Sequence[torch.Size], world: World) -> list[Cut]:
    """Return the cuts of ZeRO 3: each rank has an equal part of every matrix, the last ones padded."""
    found, offset = list[Cut](), 0
    for shape in shapes:
        length = -(-shape.numel() // world.size)
        bounds = tuple(min(rank * length, shape.numel()) for rank in range(world.size + 1))
        found.append(Cut(shape=shape, bounds=bounds, offset=offset))
        offset += length
    return found


def cuts_of(zero: Any, world: World) -> list[tuple[int, Tensor, list[Cut]]]:
    """Return the shards of a ZeRO optimizer that hold matrices alone, each with its group's number and their cuts."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        shards, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
        shapes = [[parameter.ds_shape for parameter in group] for group in groups]
        numbers = [zero.sub_group_to_group_id[k] for k in range(len(groups))]
        cuts = [each_by_itself(each, world) for each in shapes]
    else:
        half = hasattr(zero, "bf16_groups")  # ZeRO 1 in bfloat16
        shards = zero.fp32_groups_flat_partition if half else zero.single_partition_of_fp32_groups
        groups = zero.bf16_groups if half else zero.bit16_groups
        shapes = [[parameter.shape for parameter in group] for group in groups]
        numbers = list(range(len(groups)))
        cuts = [one_after_the_other(each, len(shard), world) for each, shard in zip(shapes, shards, strict=True)]
    found = zip(numbers, shards, cuts, shapes, strict=True)
    return [(number, shard, each) for number, shard, each, some in found if all(len(shape) == 2 for shape in some)]


def owners_of(cuts: Sequence[Cut], ranks: int) -> list[int]:
    """Return the rank that makes the step of each matrix: of those with a part of it, the one with the least to do."""
    load, owners = [0] * ranks, [0] * len(cuts)
    for k in sorted(range(len(cuts)), key=lambda k: -cuts[k].cost):
        holders = [rank for rank in range(ranks) if cuts[k].size(rank)]
        owners[k] = min(holders, key=lambda rank: (load[rank], -cuts[k].size(rank)))
        load[owners[k]] += cuts[k].cost
    return owners


def rounds_of(cuts: Sequence[Cut], owners: Sequence[int], ranks: int, most: int) -> list[list[list[int]]]:
    """Return the matrices that each rank steps in each round: not above `most` numbers, or one matrix."""
    queues: list[list[list[int]]] = [[] for _ in range(ranks)]
    for k, owner in enumerate(owners):
        queue, size = queues[owner], cuts[k].shape.numel()
        if queue and sum(cuts[j].shape.numel() for j in queue[-1]) + size <= most:
            queue[-1].append(k)
        else:
            queue.append([k])
    longest = max(map(len, queues))
    return [[queue[n] if n < len(queue) else [] for queue in queues] for n in range(longest)]


class Matrices:
    """See distgrow.optim.joined.Flat: each matrix is sent to one rank, which steps it and sends the step back."""

    def __init__(self, shards: Sequence[tuple[Tensor, Sequence[Cut]]], world: World, *, most: int) -> None:
        """Take over shards.

        Args:
            shards: Each with the cuts of its matrices.
            world: The ranks.
            most: Numbers that a rank holds of whole matrices at a time; one matrix may have more.
        """
        self._world, self._cuts = world, {id(shard): cuts for shard, cuts in shards}
        self._rounds = {
            id(shard): rounds_of(cuts, owners_of(cuts, world.size), world.size, most) for shard, cuts in shards
        }

    def steps(self, shard: Tensor, update: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """See Flat."""
        cuts, found = self._cuts[id(shard)], torch.zeros_like(update)
        for matrices in self._rounds[id(shard)]:
            self._round(cuts, matrices, update, found, make)
        return found

    def _round(
        self,
        cuts: Sequence[Cut],
        matrices: Sequence[Sequence[int]],
        update: Tensor,
        found: Tensor,
        make: Callable[[Tensor], Tensor],
    ) -> None:
        """Write this rank's numbers of the steps of some matrices, those of each rank, into `found`."""
        rank, ranks = self._world.rank, range(self._world.size)
        mine, sizes = [cuts[k] for k in matrices[rank]], [[cuts[k].size(rank) for k in some] for some in matrices]
        cut_up = any(cuts[k].size(owner) < cuts[k].shape.numel() for owner, some in enumerate(matrices) for k in some)
        swapped = partial(self._swapped, model=update, alone=not cut_up)
        parts = [[_part(update, cuts[k], rank) for k in some] for some in matrices]
        whole = swapped(parts, [[cut.size(r) for cut in mine] for r in ranks])
        made = [make(torch.cat(part).view(cut.shape)).flatten() for cut, *part in zip(mine, *whole, strict=True)]
        back = [[step[cut.bounds[r] : cut.bounds[r + 1]] for cut, step in zip(mine, made, strict=True)] for r in ranks]
        for some, given in zip(matrices, swapped(back, sizes), strict=True):
            for k, step in zip(some, given, strict=True):
                _part(found, cuts[k], rank).copy_(step)

    def _swapped(
        self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], *, model: Tensor, alone: bool
    ) -> list[list[Tensor]]:
        """Send some tensors to each rank, and return those that each sends here, on the device of this rank.

        Args:
            sent: The tensors for each rank.
            sizes: The lengths of those that each rank sends here.
            model: A tensor of their dtype.
            alone: Whether no rank has any for another one.
        """
        empty = torch.empty(0, dtype=model.dtype, device=self._world.device)
        flat = [torch.cat([empty, *(tensor.to(empty.device) for tensor in some)]) for some in sent]
        received = flat if alone else self._world.exchange(flat, [sum(some) for some in sizes])
        return [list(tensor.split(list(some))) for tensor, some in zip(received, sizes, strict=True)]


def _part(flat: Tensor, cut: Cut, rank: int) -> Tensor:
    """Return this rank's numbers of a matrix."""
    return flat[cut.offset : cut.offset + cut.size(rank)]
