"""Ray Train: a TorchTrainer around a loop of one's own, with Ray's prepared model and loader and its checkpoints."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch.utils.data import DataLoader

from peer_loops.work import Work


def loop(config: dict[str, Any]) -> None:
    work: Work = config["work"]()
    context = ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    os.environ["RANK"] = str(rank)
    model = prepare_model(work.model())
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr_of(0))
    begun, done, updates = 0, 0, 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begun, done, updates = state["epoch"], state["done"], state["updates"]
    for epoch in range(begun, work.epochs):
        share = work.batch_of(epoch) // world
        micro = min(share, work.max_micro)
        accum = share // micro
        for group in optimizer.param_groups:
            group["lr"] = work.lr_of(epoch)
        loader: Any = prepare_data_loader(DataLoader(work.data, batch_size=micro, shuffle=True))
        if world > 1:
            loader.sampler.set_epoch(epoch)
        for index, rows in enumerate(loader):
            if epoch == begun and index < done:
                continue
            (work.loss(model, rows) / accum).backward()
            if (index + 1) % accum and index + 1 < len(loader):
                continue
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            if updates % work.save_every == 0:
                with tempfile.TemporaryDirectory() as folder:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    state |= {"epoch": epoch, "done": index + 1, "updates": updates}
                    torch.save(state, Path(folder) / "state.pt")
                    saved = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
                    ray.train.report({}, checkpoint=saved)


def train(work: Callable[[], Work], folder: Path, world: int) -> None:
    ray.init(num_cpus=world + 1, include_dashboard=False, log_to_driver=False)
    trainer = TorchTrainer(
        loop,
        train_loop_config={"work": work},
        scaling_config=ray.train.ScalingConfig(num_workers=world),
        run_config=ray.train.RunConfig(name="peer", storage_path=str(folder)),
    )
    trainer.fit()
