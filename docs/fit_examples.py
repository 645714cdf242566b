"""An example of each argument of fit(), as docs/fit.md shows them; `# %% name` begins that of an argument.

The calls that share COMMON differ from one another in that argument alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgrow import (
    AdamW,
    Extrapolate,
    Hook,
    RunSpec,
    Torch,
    budget,
    constant,
    ema,
    every,
    exponential,
    fit,
    nice_sampling,
    sparsity,
    sqrt_lr,
)
from distgrow.core.scaling import Group, Staged
from distgrow.distributed.world import joined

images = torch.rand(512, 64)
labels = images[:, :10].argmax(1)
train = torch.utils.data.TensorDataset(images[:400], labels[:400])
held_out = torch.utils.data.TensorDataset(images[400:], labels[400:])
model = nn.Linear(64, 10)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Mean over the rows of a batch."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


runs = RunSpec(dir="runs/{n}")  # a folder of its own for every run
COMMON: dict[str, Any] = {"growth": constant(32), "budget": budget(epochs=2), "run": runs}

# %% model
# Any module. Its parameters are trained in place; those with requires_grad=False stay.
fit(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), loss, train, **COMMON)


# %% loss
# A function of the model and a batch. A module works too; parameters of its own are trained and saved.
class Smoothed(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean over the rows of a batch."""
        return nn.functional.cross_entropy(self.scale * model(batch[0]), batch[1], label_smoothing=0.1)


fit(model, Smoothed(), train, **COMMON)

# %% train
# Anything with len() and [], such as a list of samples; or a stream, with a budget in samples.
fit(model, loss, [(images[k], int(labels[k])) for k in range(400)], **COMMON)

# %% growth
# The batch is 16, 32, 64 and 128 samples, for an epoch each.
fit(model, loss, train, growth=exponential(16, 2, 128), stages=every(epochs=1), budget=budget(epochs=4), run=runs)

# %% budget
# One of epochs, samples, steps, tokens and sfo (gradient evaluations).
fit(model, loss, train, growth=constant(32), budget=budget(samples=1000), run=runs)

# %% test
# A data set, or several by name: metrics are then near/loss and far/loss.
fit(model, loss, train, **COMMON, test={"near": held_out, "far": held_out})


# %% probe
# For a training set that augments: what run.probe measures the exact gradient on.
class Noisy(torch.utils.data.Dataset[Any]):
    """The training set with noise."""

    def __len__(self) -> int:
        return len(train)

    def __getitem__(self, index: int) -> Any:
        image, label = train[index]
        return image + 0.1 * torch.randn(64), label


exact = RunSpec.model_validate({"dir": "runs/{n}", "probe": {"every_epochs": 1.0}})
fit(model, loss, Noisy(), growth=constant(32), budget=budget(epochs=2), probe=train, run=exact)


# %% metrics
# Means over rows, or pairs of a sum and a count, for what is no mean over rows. They come in place of the loss.
def metrics(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Accuracy, and the share of threes that are found."""
    right = model(batch[0]).argmax(1) == batch[1]
    threes = batch[1] == 3
    return {"accuracy": right.float().mean(), "recall/3": (right[threes].sum(), threes.sum())}


fit(model, loss, train, **COMMON, test=held_out, metrics=metrics)


# %% collate
# Makes a batch of a list of samples.
def collate(samples: list[Any]) -> Any:
    """Stack the images, and make labels of numbers."""
    return torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples])


fit(model, loss, train, **COMMON, collate=collate)

# %% items
# The loss is a mean over the labels that count: rows with the label -100 weigh nothing, in whatever micro-batch.
masked = torch.utils.data.TensorDataset(images, labels.masked_fill(labels == 0, -100))
fit(model, loss, masked, **COMMON, items=lambda batch: (batch[1] != -100).sum())

# %% tokens
# Every sample has 64 tokens, so the budget can be in tokens.
fit(model, loss, train, growth=constant(32), budget=budget(tokens=64_000), tokens=64, run=runs)

# %% stages
# Every stage takes half an epoch.
fit(model, loss, train, growth=exponential(16, 2, 64), stages=every(epochs=0.5), budget=budget(epochs=2), run=runs)

# %% lr
# Base 0.05, times the root of the growth of the batch.
fit(
    model,
    loss,
    train,
    growth=exponential(16, 2, 64),
    stages=every(epochs=1),
    budget=budget(epochs=3),
    lr=sqrt_lr(0.05),
    run=runs,
)

# %% optimizer
# A spec; or a torch optimizer over the parameters, with its learning rate; or a function of the model.
fit(model, loss, train, **COMMON, optimizer=AdamW(weight_decay=0.1, no_decay=True, clip=1.0))
fit(model, loss, train, **COMMON, optimizer=torch.optim.NAdam(model.parameters(), lr=0.002))

# %% average
# A forgetting mean of the parameters over the last 500 samples, evaluated beside them as average/loss.
fit(model, loss, train, **COMMON, test=held_out, average=ema(samples=500))

# %% sampling
# Every update draws a subset of the training set anew, in place of shuffled passes.
fit(model, loss, train, **COMMON, sampling=nice_sampling())

# %% extrapolate
# Gradients are evaluated where the last gradient, times 0.05, would lead; the optimizer steps from the parameters.
fit(model, loss, train, **COMMON, extrapolate=Extrapolate(kind="past", rate=0.05))

# %% sparsity
# From a quarter to three quarters of the compute, half of the weights of all kernels become zeros.
fit(model, loss, train, **COMMON, sparsity=sparsity(0.5))

# %% init
# Begins with the weights of another run; a file, or init_from("runs/1", step=26), does as well.
fit(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), loss, train, **COMMON, init="runs/1")

# %% engine
# At most 16 rows at once: larger batches are accumulated. FSDP() shards the model, DeepSpeed(zero=1) the optimizer.
fit(model, loss, train, **COMMON, engine=Torch(max_micro=16))

# %% run
# The folder, the seed, and the habits: checkpoints, evaluation, logging, loading.
fit(model, loss, train, growth=constant(32), budget=budget(epochs=2), run=RunSpec(dir="runs/mine", seed=1))

# %% resume
# None: go on if runs/mine holds this run, else begin. True: it must; False: it must not.
mine = RunSpec(dir="runs/mine", seed=1)
fit(model, loss, train, growth=constant(32), budget=budget(epochs=2), run=mine, resume=None)

# %% rebudget
# Goes on, with a longer budget; True lets growth and learning rates change that are cut to the budget.
fit(model, loss, train, growth=constant(32), budget=budget(epochs=3), run=mine, resume=True, rebudget=True)

# %% group
# Ends, its state saved, before the stage that wants two ranks. Who starts ranks then starts two, with resume=True.
group = Group(scaling_policy=Staged(workers=((0, 1), (2, 2))), asked=1)
fit(
    model,
    loss,
    train,
    growth=exponential(16, 2, 64),
    stages=every(epochs=1),
    budget=budget(epochs=3),
    group=group,
    run=runs,
)

# %% storage
# Checkpoints go to an object store, or to a folder that all hosts see.
fit(model, loss, train, **COMMON, storage=Path("store").resolve().as_uri())

# %% world
# Join the ranks yourself, to do more with them before and after.
with joined("cpu") as world:
    fit(model, loss, train, **COMMON, world=world)
    print(f"rank {world.rank} of {world.size}")

# %% about
# Recorded in the run folder's config.yaml.
fit(model, loss, train, **COMMON, about={"note": "first try"})


# %% trackers
# Anything with log(event) and close() hears of every update and evaluation.
class Printed:
    """Print the losses."""

    def log(self, event: Any) -> None:
        """Take an event, a flat mapping."""
        if event["event"] == "step":
            print(event["step"], event["loss"])

    def close(self) -> None:
        """Release nothing."""


fit(model, loss, train, **COMMON, trackers=[Printed()])


# %% hooks
# Methods that are called with plain values after updates and evaluations; what one raises ends the run.
class Watch(Hook):
    """Look at every evaluation."""

    def after_eval(self, evaluation: Any) -> None:
        """Print the loss."""
        print(evaluation.step, evaluation.metrics["loss"])


fit(model, loss, train, **COMMON, test=held_out, hooks=[Watch()])
