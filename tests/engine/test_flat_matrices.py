"""Matrices in ZeRO's flat shards: each number has one place, steps are those of whole matrices, rounds are bounded."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torchs
from torch import Tensor, nn

from distgrow.engine.deepspeed.matrices import (
    Cut,
    Matrices,
    each_by_itself,
    one_after_the_other,
    owners_of,
    rounds_of,
)
from distgrow.optim.joined import Muon

SHAPES = [[(3, 5), (1, 1), (4, 2), (7, 6)], [(2, 2)], [(1, 3), (3, 1)], [(20, 9), (2, 3), (2, 3), (2, 3), (5, 4)]]


class Rank:
    """A World whose ranks are threads of this process."""

    device = torch.device("cpu")

    def __init__(self, rank: int, size: int, post: list[Any], barrier: Barrier) -> None:
        self.rank, self.size, self._post, self._barrier, self.exchanges = rank, size, post, barrier, 0
        self.sent = 0

    def exchange(self, sent: list[Tensor], sizes: list[int]) -> list[Tensor]:
        self.exchanges += 1
        self.sent += sum(len(tensor) for rank, tensor in enumerate(sent) if rank != self.rank)
        self._post[self.rank] = [tensor.clone() for tensor in sent]
        self._barrier.wait(10)
        received = [self._post[rank][self.rank] for rank in range(self.size)]
        self._barrier.wait(10)
        assert [len(tensor) for tensor in received] == sizes
        return received


def on_ranks(size: int, task: Callable[[Any], Any]) -> list[Any]:
    """What a task returns on each rank."""
    post, barrier = [None] * size, Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(task, [Rank(rank, size, post, barrier) for rank in range(size)]))


def flat(zero: int, matrices: list[Tensor], size: int) -> list[Tensor]:
    """The shard of each rank, as ZeRO cuts it."""
    rows = [matrix.flatten() for matrix in matrices]
    if zero == 3:
        padded = [nn.functional.pad(row, (0, -len(row) % size)).chunk(size) for row in rows]
        return [torch.cat([parts[rank] for parts in padded]) for rank in range(size)]
    whole = torch.cat(rows)
    return list(nn.functional.pad(whole, (0, -len(whole) % (2 * size))).chunk(size))


def cuts(zero: int, shapes: list[Any], length: int, world: Any) -> list[Cut]:
    sizes = [torch.Size(shape) for shape in shapes]
    return each_by_itself(sizes, world) if zero == 3 else one_after_the_other(sizes, length, world)


def by_the_whole(matrix: Tensor) -> Tensor:
    """A step in which every number depends on every other and on its place."""
    return matrix @ matrix.mT @ matrix + matrix.cumsum(0)


@pytest.mark.parametrize("most", [1, 12, 10**6])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("shapes", SHAPES)
def test_steps_on_shards_are_those_of_whole_matrices(shapes: list[Any], zero: int, size: int, most: int) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    shards, wanted = flat(zero, matrices, size), flat(zero, list(map(by_the_whole, matrices)), size)

    def step(world: Any) -> Tensor:
        shard = shards[world.rank]
        there = [(shard, cuts(zero, shapes, len(shard), world))]
        return Matrices(there, world, most=most).steps(shard, shard, by_the_whole)

    for found, whole in zip(on_ranks(size, step), wanted, strict=True):
        torch.testing.assert_close(found, whole, rtol=0, atol=0)


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_matrix_is_stepped_once_by_a_rank_with_a_part_of_it_and_buckets_are_kept(zero: int, size: int) -> None:
    for shapes in SHAPES:
        length = -(-sum(a * b for a, b in shapes) // (2 * size)) * 2
        found = [cuts(zero, shapes, length, Rank(rank, size, [], Barrier(1))) for rank in range(size)]
        owners = owners_of(found[0], size)
        assert all(owners_of(one, size) == owners for one in found)
        assert all(found[0][k].size(owner) for k, owner in enumerate(owners))
        rounds = rounds_of(found[0], owners, size, 30)
        assert sorted(k for some in rounds for each in some for k in each) == list(range(len(shapes)))
        for some in rounds:
            for rank, each in enumerate(some):
                assert all(owners[k] == rank for k in each)
                assert len(each) <= 1 or sum(found[0][k].shape.numel() for k in each) <= 30


def test_equal_matrices_that_all_ranks_have_parts_of_are_shared_out_equally() -> None:
    shapes = [torch.Size((4, 4))] * 12
    owners = owners_of(each_by_itself(shapes, Rank(0, 4, [], Barrier(1))), 4)  # pyright: ignore[reportArgumentType]
    assert [owners.count(rank) for rank in range(4)] == [3] * 4


def test_matrices_that_no_boundary_cuts_are_not_sent() -> None:
    shapes, shards = [torch.Size((2, 3))] * 4, torch.randn(2, 12)

    def step(world: Any) -> int:
        shard = shards[world.rank]
        Matrices([(shard, one_after_the_other(shapes, 12, world))], world, most=6).steps(shard, shard, by_the_whole)
        return world.exchanges

    assert on_ranks(2, step) == [0, 0]


@pytest.mark.parametrize("most", [1, 10**6])
def test_parts_of_every_matrix_cost_a_rank_two_times_its_share(most: int) -> None:
    shapes, shards = [torch.Size((4, 6))] * 8, torch.randn(4, 48)

    def step(world: Any) -> int:
        shard = shards[world.rank]
        Matrices([(shard, each_by_itself(shapes, world))], world, most=most).steps(shard, shard, by_the_whole)
        return world.sent

    assert on_ranks(4, step) == [2 * 48 * 3 // 4] * 4


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("zero", [1, 3])
def test_muon_on_flat_shards_makes_the_steps_of_torchs(zero: int, exact: bool, nesterov: bool) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov}
    starts, size = [torch.randn(6, 5), torch.randn(3, 8), torch.randn(4, 2)], 3
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(4)]
    whole = [nn.Parameter(start.clone()) for start in starts]
    reference = Muon(whole, adjust_lr_fn="match_rms_adamw", **settings)
    reference.exact = exact

    def trained(world: Any) -> Tensor:
        shard = nn.Parameter(flat(zero, starts, size)[world.rank].clone())
        other = Muon([torch.zeros(1, 1)], adjust_lr_fn="match_rms_adamw", **settings)
        other.param_groups[0]["params"], other.exact = [shard], exact
        found = cuts(zero, [start.shape for start in starts], len(shard), world)
        other.flat = Matrices([(shard, found)], world, most=1)
        for each in gradients:
            shard.grad = flat(zero, each, size)[world.rank]
            other.step()
        return shard.detach()

    shards = on_ranks(size, trained)
    for each in gradients:
        for parameter, gradient in zip(whole, each, strict=True):
            parameter.grad = gradient.clone()
        reference.step()
    wanted = flat(zero, [parameter.detach() for parameter in whole], size)
    for found, one in zip(shards, wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_step_calls_each_hook_once_whatever_torchs_own_muon_does_inside(flat: bool, exact: bool) -> None:
    class Whole:
        def steps(self, shard: Tensor, update: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
            return make(update)

    torch.optim.Muon([nn.Parameter(torch.ones(2, 2))])  # from now on torch calls hooks around its step, too
    parameter, seen = nn.Parameter(torch.ones(4, 3)), list[str]()
    parameter.grad = torch.randn(4, 3)
    muon = Muon([parameter], lr=0.1)
    muon.flat, muon.exact = Whole() if flat else None, exact
    muon.register_step_post_hook(lambda *_: seen.append("own"))
    handle = torchs.register_optimizer_step_post_hook(lambda *_: seen.append("all"))
    try:
        muon.step()
    finally:
        handle.remove()
    assert seen == ["own", "all"]
