"""A small GPT on the sources of a few modules: decay for matrices only, warm-up and cosine, clipping, the best kept."""

import argparse
import string

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from distgrow import Cosine, KeepBest, RunSpec, budget, constant_lr, every, exponential, fit, own
from distgrow.training.spec import Evaluation


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.attention(self.ln1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary, length, width=32, heads=2, layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, lr, weight_decay, betas):
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=betas)


def load(length):
    with open(string.__file__) as file:
        text = file.read()
    letters = sorted(set(text))
    data = torch.tensor([letters.index(letter) for letter in text])
    cut = int(0.9 * len(data))
    return data[:cut], data[cut:], len(letters)


def loss(model, batch):
    return model(batch[0][:, :-1], batch[0][:, 1:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--min-lr", type=float, default=3e-4)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--eval-interval", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(1337)
    train, validation, vocabulary = load(args.length)
    model = GPT(vocabulary, args.length)
    optimizer = model.configure_optimizers(args.lr, weight_decay=0.1, betas=(0.9, 0.95))
    windows, held_out = train.unfold(0, args.length + 1, 1), validation.unfold(0, args.length + 1, args.length)
    size = args.batch_size * args.accumulation
    fit(
        model, loss, TensorDataset(windows), test=TensorDataset(held_out), optimizer=own(optimizer, clip=args.clip),
        growth=exponential(size, factor=2, cap=8 * size), stages=every(steps=args.steps // 4),
        lr=constant_lr(args.lr, Cosine(warmup=args.warmup / args.steps, final=args.min_lr / args.lr)),
        budget=budget(steps=args.steps), hooks=[KeepBest("loss")],
        run=RunSpec(dir="runs/gpt-{n}", seed=1337, eval=Evaluation(every_steps=args.eval_interval)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
