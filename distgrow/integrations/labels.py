"""How a Transformers Trainer's loss counts labels, of which those of -100 do not count."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distgrow.core.errors import ConfigError
from distgrow.data.seeding import kept_generators


class Labels:
    """The labels of one Trainer: whether it counts them, how many there are, whether rows have as many."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._counted, self._of_a_row = trainer, None, None

    def can_be_counted(self) -> bool:
        """Return whether the Trainer may divide the loss by a number of items that it is given."""
        trainer = self._trainer
        return bool(getattr(trainer, "model_accepts_loss_kwargs", False) or trainer.compute_loss_func)

    def are_counted(self, batch: Any) -> bool:
        """Return whether it really does so, which the loss of the first batch shows, for twice the items.

        Raises:
            ConfigError: It does so with a part of the loss.
        """
        if self._counted is None:
            items = self.count([batch])
            self._counted = items is not None and self._halves(batch, items)
        return self._counted

    def _halves(self, batch: Any, items: Any) -> bool:
        trainer, model = self._trainer, self._trainer.model
        was_training = model.training
        model.eval()
        try:
            with kept_generators(trainer.args.device), torch.no_grad(), trainer.compute_loss_context_manager():
                batch = trainer._prepare_inputs(batch)
                one, half = (
                    float(trainer.compute_loss(model, dict(batch), num_items_in_batch=k * items)) for k in (1, 2)
                )
        finally:
            model.train(was_training)
        if math.isclose(one, 2 * half, rel_tol=1e-3):
            return True
        if math.isclose(one, half, rel_tol=1e-3) or not math.isfinite(one):
            return False
        raise ConfigError(
            f"only a part of the loss is divided by num_items_in_batch: {one:.6g} becomes {half:.6g} for twice the "
            "items; give items=…, which counts what the whole loss is a mean over"
        )

    def count(self, batches: list[Any]) -> Any:
        """Return the labels of all ranks that count, at least 1; None if the Trainer cannot count them. Collective."""
        _, items = self._trainer.get_batch_samples(iter(batches), len(batches), self._trainer.args.device)
        return items.clamp(min=1) if isinstance(items, Tensor) else items

    def check(self, batch: Any) -> None:
        """Check that rows have as many labels that count, as the mean over labels is then the mean over rows.

        Raises:
            ConfigError: They have not.
        """
        counts = _of_rows(batch.get("labels") if isinstance(batch, Mapping) else None)
        if self._of_a_row is not None:
            counts.add(self._of_a_row)
        if len(counts) > 1:
            raise ConfigError(
                f"rows have {min(counts)} to {max(counts)} labels other than -100, so the loss is no mean over rows; "
                "give items=lambda batch: int((batch['labels'] != -100).sum()), for a model that shifts its labels (as "
                "causal ones do) of batch['labels'][:, 1:], or what else the loss is a mean over"
            )
        self._of_a_row = next(iter(counts), None)


def _of_rows(labels: Any) -> set[int]:
    """Return the numbers of labels that count in each row; empty if a row has one label, and that counts."""
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        return set()
    counts = labels.ne(-100).flatten(1).sum(1) if labels.dim() > 1 else labels.ne(-100).int()
    return set(counts.tolist())
