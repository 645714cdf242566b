"""distgrow: fit()."""

from distgrow import RunSpec, Torch, budget, every, exponential, fit, sqrt_lr
from distgrow.checkpoint.spec import Checkpointing
from peer_loops.work import Work


def train(work: Work) -> None:
    fit(
        work.model(),
        work.loss,
        work.data,
        growth=exponential(work.batch, 2, work.batch_of(work.epochs - 1)),
        stages=every(epochs=work.stage_epochs),
        lr=sqrt_lr(work.lr),
        budget=budget(epochs=work.epochs),
        engine=Torch(max_micro=work.max_micro, device="cpu"),
        run=RunSpec(dir=str(work.folder / "run"), checkpoint=Checkpointing(every_steps=work.save_every)),
        resume=work.resume,
    )
