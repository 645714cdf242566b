"""The torch engine: one process, or DistributedDataParallel over many; decides nothing about batch or learning rate."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgrow.engine import SGD, Optimizer, Torch
from distgrow.engine.batches import Loss, Metrics, WeightedLoss, checked_loss, checked_rows, means, place, seed
from distgrow.order import mix_int
from distgrow.plan import Plan
from distgrow.progress import Outcome
from distgrow.spec import ConfigError
from distgrow.world import World

#: Votes that an update can carry.
BALLOT = 4


class TorchEngine:
    """Exact mean gradients over a global batch, on whatever world and micro-batch the plan says."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        metrics: Metrics | None = None,
        spec: Torch | None = None,
        optimizer: Optimizer | None = None,
        world: World | None = None,
    ) -> None:
        self.spec, self.world, settings = spec or Torch(), world or World(), optimizer or SGD()
        double = self.spec.precision == "float64"
        self.model = model.to(device=self.world.device, dtype=torch.float64 if double else None)
        if self.spec.compile:
            self.model.compile()
        self.model.train()
        self.evaluations = 0
        self._metrics = metrics or (lambda model, batch: {"loss": loss(model, batch)})
        self._parameters = list(self.model.parameters())
        self._optimizer = build_optimizer(self._parameters, settings)
        self._clip, self._used = settings.clip, False
        self._loss = loss
        self._shared = _Shared(self.model, loss, self.world) if self.world.size > 1 else None
        self._ddp = None if self._shared is None else self._wrap(self._shared)

    def update(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Outcome:
        """See Engine. Raises ValueError where a micro-batch does not have the rows that the plan gave it."""
        seed(mix_int(plan.seed, self.world.rank), self.world.device)
        notes = self.accumulate(plan, micro_batches, votes)
        grad_norm = self._clipped_norm().item()  # waits for a GPU
        loss, *ballot = notes.tolist()
        applied = math.isfinite(grad_norm)
        if applied:
            self.step(plan.lr)
        self._forget()
        cast = tuple(count > 0 for count in ballot) if self.world.size > 1 else tuple(votes)
        return Outcome(applied=applied, loss=loss, grad_norm=grad_norm, votes=cast[: len(votes)])

    def accumulate(self, plan: Plan, micro_batches: Iterable[Any], votes: Sequence[bool] = ()) -> Tensor:
        """Add this rank's part to the gradients; gives the mean loss and, from several ranks, the votes cast.

        The last backward averages over ranks; the ones before it do not communicate.
        """
        losses: list[Tensor] = []
        for k, batch in enumerate(micro_batches, start=1):
            rows, last = checked_rows(batch, plan), k == plan.accum
            with nullcontext() if self._ddp is None or last else self._ddp.no_sync():
                loss = self._weighted(batch, plan.weight(rows), votes if last else ())
                loss.backward()
            losses.append(loss.detach())
            self.evaluations += rows
        if self._shared is None:
            return sum(losses[1:], start=losses[0]).reshape(1)
        self._check_use()
        assert self._shared.tally.grad is not None
        return self._shared.tally.grad

    def _check_use(self) -> None:
        """ConfigError where the first update left parameters without a gradient: DDP would wait for them for ever."""
        if self._used:
            return
        named = self.model.named_parameters()
        unused = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if unused:
            shown = ", ".join(unused[:5]) + (" …" if len(unused) > 5 else "")
            raise ConfigError(
                f"the loss does not depend on {shown}, and several ranks need every gradient: "
                "set requires_grad=False there, or train in one process"
            )
        self._used = True

    def step(self, lr: float) -> None:
        """One optimizer step at learning rate `lr`, times a parameter group's own lr_scale."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._optimizer.step()

    def evaluate(self, batches: Iterable[tuple[Any, int]]) -> dict[str, float]:
        """See Engine."""
        self.world.share(list(self.model.buffers()))
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            found = means(lambda batch: self._metrics(self.model, self._place(batch)), batches, self.world)
        self.model.train(was_training)
        return found

    def save(self, folder: Path) -> None:
        """See Engine; the first rank writes."""
        if self.world.rank == 0:
            state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        """See Engine."""
        state = torch.load(folder / "engine.pt", map_location=self.world.device, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{folder} was written with another model: {error}; give the run back its own") from None

    def _forget(self) -> None:
        """Drop the gradients; Optimizer.zero_grad does the same, many times slower."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._shared is not None:
            self._shared.tally.grad = None

    def _weighted(self, batch: Any, weight: float, votes: Sequence[bool]) -> Tensor:
        with self._autocast():
            batch = self._place(batch)
            if self._ddp is not None:
                return self._ddp(batch, weight, votes)
            loss = checked_loss(self._loss(self.model, batch))
            return loss if weight == 1 else loss * weight

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.spec.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _place(self, batch: Any) -> Any:
        return place(batch, self.world.device, torch.float64 if self.spec.precision == "float64" else None)

    def _clipped_norm(self) -> Tensor:
        """The norm of the mean gradient, which is then clipped; a non-finite one is the same on every rank."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        # as nn.utils.get_total_norm, which sorts by device first and takes twice as long
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))  # pyright: ignore[reportPrivateImportUsage]
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return norm

    def _wrap(self, shared: nn.Module) -> DistributedDataParallel:
        """DDP with its buckets settled.

        DDP regroups its buckets after the first backward, by the order in which gradients arrived. The order of a
        sum over three or more ranks depends on the grouping, so a resumed run would differ in the last bits from
        one that was never stopped. A first backward through zeros, before any data, fixes the grouping for both.
        """
        cuda = self.world.device.type == "cuda"
        ddp = DistributedDataParallel(
            shared,
            device_ids=[self.world.device.index] if cuda else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.spec.bucket_mb,  # pyright: ignore[reportArgumentType]
        )
        ddp(None, 0.0, ()).backward()
        self._forget()
        return ddp


class _Shared(WeightedLoss):
    """Model and loss as the one module that DDP wraps.

    What ranks must also know of each other, the mean loss and their votes, travels in the gradients' own
    all-reduce: they are the gradient of `tally`, a parameter that is always zero and that nobody else sees.
    """

    def __init__(self, model: nn.Module, loss: Loss, world: World) -> None:
        super().__init__(model, loss)
        dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        self.tally = nn.Parameter(torch.zeros(1 + BALLOT, dtype=dtype, device=world.device))

    def forward(self, batch: Any, weight: float, votes: Sequence[bool] = ()) -> Tensor:
        """The weighted loss; without a batch, zero, through all that has a gradient."""
        if batch is None:
            return torch.stack([0.0 * p.sum() for p in self.parameters() if p.requires_grad]).sum()
        loss = super().forward(batch, weight)
        return loss + (self.tally * self._notes(loss, votes)).sum()

    def _notes(self, loss: Tensor, votes: Sequence[bool]) -> Tensor:
        ballot = self.tally.new_tensor([*votes, *[False] * (BALLOT - len(votes))])
        return torch.cat([loss.detach().to(ballot.dtype)[None], ballot])


def build_optimizer(parameters: Sequence[nn.Parameter], spec: Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer of a spec; its learning rate is assigned at every update.

    The fused ones: AdamW's step takes half the time of the default, on a CPU too. They know no complex numbers.
    """
    fused = not any(parameter.is_complex() for parameter in parameters)
    common = {"lr": 0.0, "weight_decay": spec.weight_decay, "fused": fused}
    if isinstance(spec, SGD):
        return torch.optim.SGD(parameters, momentum=spec.momentum, nesterov=spec.nesterov, **common)
    return torch.optim.AdamW(parameters, betas=(spec.beta1, spec.beta2), eps=spec.eps, **common)
