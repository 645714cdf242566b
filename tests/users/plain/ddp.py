"""A DDP script: AdamW groups, EMA of the weights, clipping, cosine, bf16, an iterable data set, early stopping."""

import argparse
import copy
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset


class Stream(IterableDataset):
    """Digits read from a source that only goes forward, each rank its own rows."""

    def __init__(self, rows, rank, world):
        self.rows, self.rank, self.world = rows, rank, world

    def __iter__(self):
        digits = load_digits()
        for number in self.rows:
            if number % self.world == self.rank:
                yield torch.tensor(digits.data[number] / 16).float(), int(digits.target[number])


def build():
    return nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 10))


def evaluate(model, loader, device):
    model.eval()
    totals = torch.zeros(2, device=device)
    with torch.no_grad():
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device), reduction="sum")
            totals += torch.stack([loss, torch.tensor(float(len(y)), device=device)])
    model.train()
    if dist.is_initialized():
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--output", default="ddp.pt")
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    train, test = Stream(range(1437), rank, world), Stream(range(1437, 1797), rank, world)
    model = build().to(device)
    average = copy.deepcopy(model)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    total = args.epochs * math.ceil(1437 / args.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    best, waited = math.inf, 0
    for epoch in range(args.epochs):
        for x, y in DataLoader(train, batch_size=args.batch_size // world):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = F.cross_entropy(wrapped(x.to(device)), y.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(parameter, 0.01)
        loss = evaluate(average, DataLoader(test, batch_size=256), device)
        if rank == 0:
            print(f"epoch {epoch}: averaged weights, test loss {loss:.4f}")
        waited = 0 if loss < best else waited + 1
        if loss < best and rank == 0:
            torch.save(average.state_dict(), args.output)
        best = min(best, loss)
        if waited > args.patience:
            break
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
