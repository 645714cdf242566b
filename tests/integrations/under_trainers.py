"""A rank of the tests of other trainers: the problem under one of them; rank 0 writes what it came to."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # conftest, which problem imports

from problem import MOMENTUM, Network, Rows, controller, flat

from distgrow.core.progress import Progress
from distgrow.launch.local import leave


def under_transformers(folder: Path) -> tuple[int, torch.Tensor, Progress]:
    """Rank, parameters and progress."""
    from transformers import TrainingArguments

    from distgrow.integrations.transformers import GrowthTrainer

    args = TrainingArguments(
        output_dir=str(folder / "run"), use_cpu=True, report_to=[], max_grad_norm=0.0, save_steps=45, disable_tqdm=True
    )
    ends: list[GrowthTrainer] = []
    for start in (None, str(folder / "run/checkpoint-45")):
        model = Network(0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=MOMENTUM)
        trainer = GrowthTrainer(
            model,
            args,
            controller=controller(),
            train_dataset=Rows(),
            optimizers=(optimizer, None),
            record=folder / "record",
        )
        trainer.train(resume_from_checkpoint=start)
        ends.append(trainer)
    whole, resumed = ends
    assert torch.equal(flat(whole.model), flat(resumed.model)), "resumed, it ended elsewhere"
    return args.process_index, flat(resumed.model), resumed.session.progress


def under_lightning(folder: Path) -> tuple[int, torch.Tensor, Progress]:
    """Rank, parameters and progress."""
    from lightning.pytorch import Trainer
    from test_lightning import QUIET, GrowingNet

    from distgrow.integrations.lightning import Growth

    growth, module = Growth(controller(), Rows(), record=folder / "record"), GrowingNet(0.0)
    trainer = Trainer(**QUIET, strategy="ddp", devices=2, callbacks=[growth])
    trainer.fit(module)
    return trainer.global_rank, flat(module), growth.session.progress


def main(name: str, folder: Path) -> None:
    """Train under the trainer of that name."""
    trainers: dict[str, Any] = {"transformers": under_transformers, "lightning": under_lightning}
    rank, parameters, progress = trainers[name](folder)
    assert progress.ledger.total == progress.ledger.applied
    if rank == 0:
        torch.save({"parameters": parameters, "applied": progress.ledger.applied}, folder / "found.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
