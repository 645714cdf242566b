"""Hugging Face Accelerate: prepare, accumulate, save_state and skip_first_batches."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from peer_loops.work import Work


class Counters:
    """Where the training is, saved with the rest."""

    def __init__(self) -> None:
        self.epoch, self.done, self.updates = 0, 0, 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def train(work: Work) -> None:
    accelerator = Accelerator(cpu=True)
    model = work.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr_of(0))
    model, optimizer = accelerator.prepare(model, optimizer)
    at, path = Counters(), str(Path(work.folder) / "accelerate")
    accelerator.register_for_checkpointing(at)
    if work.resume:
        accelerator.load_state(path)
    begun, skip = at.epoch, at.done
    for epoch in range(begun, work.epochs):
        share = work.batch_of(epoch) // accelerator.num_processes
        micro = min(share, work.max_micro)
        accelerator.gradient_accumulation_steps = share // micro
        for group in optimizer.param_groups:
            group["lr"] = work.lr_of(epoch)
        set_seed(epoch)
        loader: Any = accelerator.prepare(DataLoader(work.data, batch_size=micro, shuffle=True))
        if epoch == begun and skip:
            loader = accelerator.skip_first_batches(loader, skip)
        at.epoch, at.done = epoch, skip if epoch == begun else 0
        for rows in loader:
            with accelerator.accumulate(model):
                accelerator.backward(work.loss(model, rows))
                optimizer.step()
                optimizer.zero_grad()
            at.done += 1
            if accelerator.sync_gradients:
                at.updates += 1
                if at.updates % work.save_every == 0:
                    accelerator.save_state(path)
    accelerator.end_training()
