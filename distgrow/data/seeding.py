"""The random generators that a user's code may draw from: Python's, numpy's and torch's, seeded and kept together."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.random import mtrand


def seed_generators(number: int, device: torch.device | None = None) -> None:
    """Seed Python's, numpy's and torch's generators, and the device's if it is a GPU.

    torch.manual_seed does more: it seeds every backend, which is slow.
    """
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(number)


@contextmanager
def kept_generators(device: torch.device | None = None, numbers: np.random.MT19937 | None = None) -> Iterator[None]:
    """Restore the states of all generators that `seed_generators` seeds when the context ends.

    np.random draws from `numbers` within the context, for copying its own state would take long.
    """
    python, numpy, cpu = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    mtrand.set_bit_generator(numbers or np.random.MT19937(0))
    on_gpu = device is not None and device.type == "cuda"
    try:
        with torch.random.fork_rng([device]) if on_gpu else nullcontext():
            yield
    finally:
        random.setstate(python)
        mtrand.set_bit_generator(numpy)
        torch.set_rng_state(cpu)
