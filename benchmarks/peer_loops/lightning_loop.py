"""Lightning: a Trainer with its GradientAccumulationScheduler; the micro-batch stays as it was at the beginning."""

import os

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from peer_loops.work import Rows, Work


class Module(LightningModule):
    """The model, with η set at the beginning of every epoch."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.model = work, work.model()

    def training_step(self, rows: Rows) -> Tensor:
        return self.work.loss(self.model, rows)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.work.lr_of(0))

    def on_train_epoch_start(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.work.lr_of(self.current_epoch)


def train(work: Work) -> None:
    world = int(os.environ["WORLD_SIZE"])
    micro = min(work.batch // world, work.max_micro)
    accum = {epoch: work.batch_of(epoch) // world // micro for epoch in range(0, work.epochs, work.stage_epochs)}
    saving = ModelCheckpoint(work.folder / "lightning", save_last=True, every_n_train_steps=work.save_every)
    trainer = Trainer(
        max_epochs=work.epochs,
        accelerator="cpu",
        strategy="ddp",
        devices=world,
        callbacks=[GradientAccumulationScheduler(accum), saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(work.data, batch_size=micro, shuffle=True)
    trainer.fit(Module(work), loader, ckpt_path="last" if work.resume else None, weights_only=True)
