"""DeepSpeed's engine with a loop by hand, growing by set_train_batch_size."""

from typing import Any

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler

from peer_loops.work import Work


def train(work: Work) -> None:
    deepspeed.init_distributed("gloo")
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    micro = min(work.batch // world, work.max_micro)
    model = work.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr_of(0))
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": work.batch,
            "train_micro_batch_size_per_gpu": micro,
            "zero_optimization": {"stage": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        },
    )
    path, begun, done, updates = str(work.folder / "deepspeed"), 0, 0, 0
    if work.resume:
        _, state = engine.load_checkpoint(path)
        begun, done, updates = state["epoch"], state["done"], state["updates"]
    for epoch in range(begun, work.epochs):
        engine.set_train_batch_size(work.batch_of(epoch))
        for group in optimizer.param_groups:
            group["lr"] = work.lr_of(epoch)
        sampler = DistributedSampler(work.data, world, rank, seed=0)
        sampler.set_epoch(epoch)
        for index, rows in enumerate(DataLoader(work.data, batch_size=micro, sampler=sampler)):
            if epoch == begun and index < done:
                continue
            engine.backward(work.loss(engine, rows))
            last = engine.is_gradient_accumulation_boundary()
            engine.step()
            if last:
                updates += 1
                if updates % work.save_every == 0:
                    state = {"epoch": epoch, "done": index + 1, "updates": updates}
                    engine.save_checkpoint(path, client_state=state)
