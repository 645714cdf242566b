"""What every peer trains: model, data, and the growth that each has to get done its own way."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from loops import build
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from peer_loops.watch import Watch

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One training: the batch doubles and η grows with its root every `stage_epochs` epochs."""

    make: Callable[[], nn.Module]
    data: TensorDataset
    folder: Path  #: for checkpoints and for what is watched
    resume: bool = False
    batch: int  #: of the first stage, on all ranks together
    stages: int
    stage_epochs: int = 2
    max_micro: int  #: rows of a micro-batch that a rank has memory for
    lr: float
    save_every: int  #: updates
    stop_after: int = 0  #: updates after which the process dies, if not 0
    exact: bool = False  #: whether every update's samples, gradient and parameters are written down

    @property
    def epochs(self) -> int:
        """Of the whole training."""
        return self.stages * self.stage_epochs

    def batch_of(self, epoch: int) -> int:
        """The global batch that is wanted in an epoch."""
        return self.batch * 2 ** (epoch // self.stage_epochs)

    def lr_of(self, epoch: int) -> float:
        """η that is wanted in an epoch: ∝ √b."""
        return self.lr * 2 ** (epoch // self.stage_epochs / 2)

    def model(self) -> nn.Module:
        """The same for every peer, watched."""
        torch.manual_seed(0)
        model = self.make()
        Watch(model, self.folder, exact=self.exact, stop_after=self.stop_after)
        return model

    @staticmethod
    def loss(model: Callable[[Tensor], Tensor], rows: Rows) -> Tensor:
        """Mean over the rows."""
        return F.cross_entropy(model(rows[0]), rows[1])


def timed(folder: Path, stage_epochs: int) -> Work:
    """The CNN of overhead.py on 1,437 images, batches of 32 to 256, nothing saved on the way."""
    task = build("cnn")
    data = TensorDataset(task.train.inputs, task.train.labels)
    return Work(
        make=lambda: task.model, data=data, folder=folder, batch=32, stages=4, stage_epochs=stage_epochs, max_micro=16,
        lr=0.02, save_every=10**9,
    )  # fmt: skip


def checked(folder: Path, *, resume: bool = False, stop_after: int = 0) -> Work:
    """Softmax regression on 203 samples, a number that no batch divides."""
    random = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(203, 7, generator=random), torch.randint(3, (203,), generator=random))
    return Work(
        make=lambda: nn.Linear(7, 3), data=data, folder=folder, resume=resume, batch=8, stages=3, max_micro=4, lr=0.1,
        save_every=7, stop_after=stop_after, exact=True,
    )  # fmt: skip
