"""Arbiter's published scheduler, as benchmarks/arbiter.py has it: what moves its batch, and what does not."""

import pytest
import torch
from arbiter import LARGEST, SMALLEST, Network, Scheduler, logit_of, published, size_of
from torch import Tensor
from torch.nn.functional import cross_entropy


def moved(w: Tensor) -> list[Tensor | None]:
    """Return the scheduler's gradients of the loss that it learns by."""
    torch.manual_seed(0)
    network, scheduler = Network(), Scheduler()
    inputs, labels = torch.randn(20, 64), torch.randint(10, (20,))
    cross_entropy(network(inputs, w * scheduler(inputs)), labels).backward()
    return [parameter.grad for parameter in scheduler.parameters()]


def test_without_w_nothing_moves_the_batch() -> None:
    assert all(gradient is None or not gradient.any() for gradient in moved(torch.zeros(32)))


def test_the_sign_of_w_is_the_direction_that_the_batch_moves_in_while_features_are_hardly_scaled() -> None:
    """To first order in W the gradients of W and −W are opposite: no property of the batch can be in them."""
    w = 1e-4 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    for one, other in zip(moved(w), moved(-w), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, -other, rtol=2e-2, atol=1e-9)


def test_the_order_of_logits_does_not_matter_and_one_logit_is_the_batch() -> None:
    scheduler = Scheduler()
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1])
    assert scheduler.weighted(logits) == scheduler.weighted(logits[[2, 0, 3, 1]])
    assert Scheduler(logits=1).weighted(torch.tensor([0.7])).item() == pytest.approx(0.7)


def test_batches_keep_their_bounds_and_come_back_but_for_the_rounding_of_their_floor() -> None:
    assert size_of(torch.tensor(-50.0)) == SMALLEST
    assert size_of(torch.tensor(50.0)) == LARGEST
    backs = [size_of(logit_of(batch)) - batch for batch in range(SMALLEST + 1, LARGEST)]
    assert set(backs) <= {-1, 0}


def test_evaluations_on_validation_samples_are_counted() -> None:
    """About one for each that updates apply: the scheduler begins at the batch of the updates."""
    _, probed, applied = published(0, 1, epochs=1)
    assert applied == 1149
    assert 0.8 < probed / applied < 1.3
