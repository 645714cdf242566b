"""A DDP script: AdamW groups, EMA of the weights, clipping, cosine, bf16, an iterable data set, early stopping."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import IterableDataset

from distgrow import Cosine, EarlyStopping, KeepBest, RunSpec, Torch, budget, constant_lr, ema, every, exponential, fit, own
from distgrow.training.spec import Evaluation


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


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--patience", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    train, test = Stream(range(1437), 0, 1), list(Stream(range(1437, 1797), 0, 1))
    model = build()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    fit(
        model, loss, train, test=test, optimizer=own(optimizer, clip=1.0), average=ema(samples=100 * args.batch_size),
        growth=exponential(args.batch_size, factor=2, cap=512), stages=every(samples=3 * 1437),
        lr=constant_lr(args.lr, Cosine()), budget=budget(samples=args.epochs * 1437),
        engine=Torch(precision="bfloat16"),
        hooks=[KeepBest("average/loss"), EarlyStopping("average/loss", patience=args.patience + 1)],
        run=RunSpec(dir="runs/ddp-{n}", eval=Evaluation(every_samples=1437)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
