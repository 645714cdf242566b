"""The published experiments' way: a new DataLoader at each growth, the exact ‖∇f‖ over all data every epoch."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset

from peer_loops.work import Work


def full_gradient_norm(work: Work, model: DistributedDataParallel, batch: int) -> float:
    """Exact, each rank its share of the data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = Subset(work.data, range(rank, len(work.data), world))
    model.eval()
    for rows in DataLoader(share, batch_size=batch):
        with model.no_sync():
            (work.loss(model, rows) * len(rows[0]) / len(work.data)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    dist.all_reduce(gradient)
    model.zero_grad()
    model.train()
    return gradient.norm().item()


def train(work: Work) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(work.model())
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr_of(0))
    path, begun = work.folder / "reference.pt", 0
    if work.resume and path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["epoch"]
    batch, norms = work.batch_of(begun), []
    sampler = DistributedSampler(work.data, world, rank, seed=0)
    loader = DataLoader(work.data, batch_size=batch // world, sampler=sampler)
    for epoch in range(begun, work.epochs):
        if work.batch_of(epoch) != batch:
            for group in optimizer.param_groups:
                group["lr"] *= (work.batch_of(epoch) / batch) ** 0.5
            batch = work.batch_of(epoch)
            loader = DataLoader(work.data, batch_size=batch // world, sampler=sampler)
        sampler.set_epoch(epoch)
        for rows in loader:
            work.loss(model, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
        norms.append(full_gradient_norm(work, model, batch // world))
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state, path)
    dist.destroy_process_group()
