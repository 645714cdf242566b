"""A DDP script: AdamW groups, EMA of the weights, clipping, cosine, bf16, an iterable data set, early stopping."""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Stream(IterableDataset):
    """Digits read from a source that only goes forward."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        digits = load_digits()
        for number in self.rows:
            yield torch.tensor(digits.data[number] / 16).float(), int(digits.target[number])


def build():
    return nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 10))


def evaluate(model, loader, accelerator):
    model.eval()
    totals = torch.zeros(2, device=accelerator.device)
    with torch.no_grad():
        for x, y in loader:
            logits, y = accelerator.gather_for_metrics((model(x), y))
            loss = F.cross_entropy(logits, y, reduction="sum")
            totals += torch.stack([loss, torch.tensor(float(len(y)), device=accelerator.device)])
    model.train()
    return (totals[0] / totals[1]).item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--output", default="ddp.pt")
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision="bf16")
    torch.manual_seed(0)
    train, test = Stream(range(1437)), Stream(range(1437, 1797))
    model = build()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    total = args.epochs * math.ceil(1437 / args.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    loader = DataLoader(train, batch_size=args.batch_size // accelerator.num_processes)
    model, optimizer, scheduler, loader, test = accelerator.prepare(
        model, optimizer, scheduler, loader, DataLoader(test, batch_size=256)
    )
    average = copy.deepcopy(accelerator.unwrap_model(model))
    best, waited = math.inf, 0
    for epoch in range(args.epochs):
        for x, y in loader:
            with accelerator.autocast():
                loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(parameter, 0.01)
        loss = evaluate(average, test, accelerator)
        accelerator.print(f"epoch {epoch}: averaged weights, test loss {loss:.4f}")
        waited = 0 if loss < best else waited + 1
        if loss < best:
            accelerator.save(average.state_dict(), args.output)
        best = min(best, loss)
        if waited > args.patience:
            break


if __name__ == "__main__":
    main()
