"""Under Lightning a loss that is no mean over rows is refused before the first update, and a mean leaves no trace."""

from typing import Any

import pytest
import torch
from problem import Network, Rows, controller
from torch import Tensor
from torch.nn import functional as F

from distgrow.core.errors import ConfigError

lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra 'lightning'")
from torchmetrics import MeanMetric  # noqa: E402

from distgrow.integrations.lightning import Growing, Growth  # noqa: E402

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": -1}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
ARGUMENTS: dict[str, Any] = {"reduction": "sum"}
WEIGHTED: dict[str, Any] = {"weight": torch.tensor([1.0, 6.0], dtype=torch.float64)}


class Net(lightning.LightningModule):
    """Logs, counts and collects what its step sees, as many modules do."""

    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.network, self.kind, self.mean = Network(0.0), kind, MeanMetric()
        self.steps, self.seen, self.best = 0, list[int](), {"loss": 1e9}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.network(batch["x"])["logits"], batch["labels"], **self.kind)
        self.log("loss", loss, on_step=True, prog_bar=True)
        self.log_dict({"again": loss})
        self.mean.update(loss.detach())
        self.steps += 1
        self.seen.append(len(batch["x"]))
        self.best["loss"] = min(self.best["loss"], float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class GrowingNet(Growing, Net):
    """The same, growing."""


class AtTheStart(lightning.Callback):
    """Notes what is known after Growth has looked at the loss."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.metrics = dict(trainer.callback_metrics)
        self.updates = int(pl_module.mean.update_count)
        self.left = (pl_module.steps, list(pl_module.seen), dict(pl_module.best))
        self.parameters = torch.cat([parameter.flatten() for parameter in pl_module.parameters()]).detach()
        self.training = pl_module.training


def train(module: Any, *callbacks: Any, **rows: Any) -> Growth:
    growth = Growth(controller(), Rows(), **rows)
    lightning.Trainer(**QUIET, callbacks=[growth, *callbacks]).fit(module)
    return growth


@pytest.mark.parametrize("kind", [ARGUMENTS, WEIGHTED])
def test_what_is_no_mean_over_rows_is_refused_before_the_first_update(kind: dict[str, Any]) -> None:
    module = GrowingNet(**kind)
    with pytest.raises(ConfigError, match=r"no mean over samples.*the controller's max_micro.*give Growth items="):
        train(module)
    assert module.steps == 0


def test_items_say_what_else_a_loss_is_a_mean_over() -> None:
    growth = train(GrowingNet(**WEIGHTED), items=lambda batch: int((1 + 5 * batch["labels"]).sum()))
    assert growth.session.progress.ledger.applied == 900


def test_a_mean_leaves_nothing_behind_of_the_look_at_it() -> None:
    module, start = GrowingNet(), AtTheStart()
    before = torch.cat([parameter.flatten() for parameter in module.parameters()]).detach().clone()
    growth = train(module, start)
    assert start.left == (0, [], {"loss": 1e9})
    assert start.updates == 0
    assert start.metrics == {}
    assert torch.equal(start.parameters, before)
    assert start.training
    assert "log" not in vars(module)
    assert sum(module.seen) == growth.session.progress.samples


def test_a_run_that_goes_on_is_not_looked_at_again(tmp_path: Any) -> None:
    module = GrowingNet()
    keep = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=15, save_top_k=-1)
    quiet = {**QUIET, "enable_checkpointing": True}
    lightning.Trainer(**quiet, callbacks=[Growth(controller(), Rows()), keep]).fit(module)
    resumed = GrowingNet()
    resumed.kind = ARGUMENTS  # a sum, which a new run would refuse
    trainer = lightning.Trainer(**QUIET, callbacks=[Growth(controller(), Rows())])
    trainer.fit(resumed, ckpt_path=min(tmp_path.glob("*.ckpt")), weights_only=True)
    assert resumed.steps > 0
