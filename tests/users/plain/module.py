"""A Lightning module with AdamW, a metric, a checkpoint of the best and early stopping."""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    def __init__(self, width=32, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 10))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.01)


def load():
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    return torch.utils.data.Subset(data, range(1437)), torch.utils.data.Subset(data, range(1437, 1797))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", default="lightning")
    args = parser.parse_args()
    pl.seed_everything(0)
    train, validation = load()
    model = Classifier()
    best = ModelCheckpoint(dirpath=args.output, monitor="val_loss", filename="best")
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="auto",
        logger=False,
        callbacks=[best, EarlyStopping(monitor="val_loss", patience=3)],
    )
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(validation, batch_size=256))
    print(f"best validation loss {best.best_model_score:.4f}")


if __name__ == "__main__":
    main()
