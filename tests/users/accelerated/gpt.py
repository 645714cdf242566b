"""A small GPT on the sources of a few modules: decay for matrices only, warm-up and cosine, clipping, the best kept."""

import argparse
import math
import string

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn


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


def get_batch(data, size, length):
    starts = torch.randint(len(data) - length, (size,))
    windows = torch.stack([data[start : start + length + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def estimate_loss(model, data, args, accelerator):
    model.eval()
    batches = [get_batch(data, args.batch_size, args.length) for _ in range(args.eval_iters)]
    losses = [model(*(part.to(accelerator.device) for part in batch)) for batch in batches]
    model.train()
    return accelerator.reduce(sum(losses) / len(losses), "mean").item()


def get_lr(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    ratio = (step - args.warmup) / (args.steps - args.warmup)
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (args.lr - args.min_lr)


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
    parser.add_argument("--eval-iters", type=int, default=8)
    parser.add_argument("--out", default="gpt.pt")
    args = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulation)
    set_seed(1337, device_specific=True)
    train, validation, vocabulary = load(args.length)
    model = GPT(vocabulary, args.length)
    optimizer = model.configure_optimizers(args.lr, weight_decay=0.1, betas=(0.9, 0.95))
    model, optimizer = accelerator.prepare(model, optimizer)
    best = math.inf
    for step in range(args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, args)
        if step % args.eval_interval == 0:
            loss = estimate_loss(model, validation, args, accelerator)
            accelerator.print(f"step {step}: validation loss {loss:.4f}")
            if loss < best:
                best = loss
                accelerator.save(accelerator.unwrap_model(model).state_dict(), args.out)
        for _ in range(args.accumulation):
            inputs, targets = get_batch(train, args.batch_size, args.length)
            with accelerator.accumulate(model):
                loss = model(inputs.to(accelerator.device), targets.to(accelerator.device))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
