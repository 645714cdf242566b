"""DistributedDataParallel, by hand."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from peer_loops.work import Work


def train(work: Work) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(work.model())
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr_of(0))
    path = work.folder / "bare.pt"
    begun, done, updates = 0, 0, 0
    if work.resume:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begun, done, updates = state["epoch"], state["done"], state["updates"]
    for epoch in range(begun, work.epochs):
        share = work.batch_of(epoch) // world
        micro = min(share, work.max_micro)
        accum = share // micro
        for group in optimizer.param_groups:
            group["lr"] = work.lr_of(epoch)
        sampler = DistributedSampler(work.data, world, rank, seed=0)
        sampler.set_epoch(epoch)
        loader = DataLoader(work.data, batch_size=micro, sampler=sampler)
        for index, rows in enumerate(loader):
            if epoch == begun and index < done:
                continue
            last = (index + 1) % accum == 0 or index + 1 == len(loader)
            with nullcontext() if last else model.no_sync():
                (work.loss(model, rows) / accum).backward()
            if not last:
                continue
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            if rank == 0 and updates % work.save_every == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "epoch": epoch, "done": index + 1, "updates": updates}, path)
    dist.destroy_process_group()
