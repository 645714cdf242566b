"""A small convolutional network on handwritten digits: Adadelta, a rate that falls each epoch, a test after each."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import TensorDataset

from distgrow import RunSpec, StepDecay, budget, constant_lr, every, exponential, fit
from distgrow.core.lr import DecayEvery


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, 1, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(144, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(self.dropout1(x), 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


def load():
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float().unsqueeze(1), torch.tensor(digits.target)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def loss(model, batch):
    return F.nll_loss(model(batch[0]), batch[1])


def metrics(model, batch):
    output = model(batch[0])
    return {"loss": F.nll_loss(output, batch[1]), "accuracy": (output.argmax(1) == batch[1]).float().mean()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--gamma", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-model", default="mnist.pt")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train_set, test_set = load()
    model = Net()
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    fit(
        model, loss, train_set, test=test_set, metrics=metrics, optimizer=optimizer,
        growth=exponential(args.batch_size, factor=2, cap=128), stages=every(epochs=2), budget=budget(epochs=args.epochs),
        lr=constant_lr(args.lr, StepDecay(every=DecayEvery(epochs=1), factor=args.gamma)),
        run=RunSpec(dir="runs/mnist-{n}", seed=args.seed),
    )  # fmt: skip
    torch.save(model.state_dict(), args.save_model)


if __name__ == "__main__":
    main()
