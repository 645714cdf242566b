"""The torch engine: one process, or DistributedDataParallel over many; decides nothing about batch or learning rate."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgrow.engine import SGD, Optimizer, Torch
from distgrow.order import mix_int
from distgrow.plan import Plan
from distgrow.progress import Outcome
from distgrow.spec import ConfigError
from distgrow.world import World

Loss = Callable[[nn.Module, Any], Tensor]
Metrics = Callable[[nn.Module, Any], dict[str, Tensor]]


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
        self.evaluations = 0
        self._metrics = metrics or (lambda model, batch: {"loss": loss(model, batch)})
        self._optimizer = build_optimizer(self.model.parameters(), settings)
        self._clip = settings.clip
        self._step_loss = _StepLoss(self.model, loss)
        self._ddp = self._wrap() if self.world.size > 1 else None

    def update(self, plan: Plan, micro_batches: Iterable[Any]) -> Outcome:
        """See Engine. Raises ValueError where a micro-batch does not have the rows that the plan gave it."""
        torch.manual_seed(mix_int(plan.seed, self.world.rank))
        total_loss = self.world.sum([self.accumulate(plan, micro_batches)])
        grad_norm = self._clipped_norm()
        applied = bool(torch.isfinite(grad_norm))
        if applied:
            self.step(plan.lr)
        self._optimizer.zero_grad(set_to_none=True)
        return Outcome(applied=applied, loss=total_loss.wait()[0], grad_norm=grad_norm.item())

    def accumulate(self, plan: Plan, micro_batches: Iterable[Any]) -> float:
        """Add this rank's part to the gradients, and give its part of the mean loss.

        The last backward averages over ranks; the ones before it do not communicate.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for k, batch in enumerate(micro_batches, start=1):
            rows = count_rows(batch)
            if rows > plan.micro:
                raise ConfigError(f"a micro-batch has {rows} rows where the plan has {plan.micro}; check task.collate")
            quiet = self._ddp.no_sync() if self._ddp is not None and k < plan.accum else nullcontext()
            with quiet:
                loss = self._loss(batch) * plan.weight(rows)
                loss.backward()
            total += loss.detach()
            self.evaluations += rows
        return total.item() / self.world.size

    def step(self, lr: float) -> None:
        """One optimizer step at learning rate `lr`, times a parameter group's own lr_scale."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._optimizer.step()

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """See Engine."""
        self.world.share(list(self.model.buffers()))
        was_training = self.model.training
        self.model.eval()
        sums: dict[str, float] = {}
        seen = 0
        with torch.inference_mode(), self._autocast():
            for batch in batches:
                rows = count_rows(batch)
                seen += rows
                for name, mean in self._metrics(self.model, self._place(batch)).items():
                    sums[name] = sums.get(name, 0.0) + float(mean) * rows
        self.model.train(was_training)
        names = sorted(sums)
        *totals, rows = self.world.sum([*(sums[name] for name in names), seen]).wait()
        return {name: value / rows for name, value in zip(names, totals, strict=True)}

    def save(self, folder: Path) -> None:
        """See Engine."""
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        """See Engine."""
        state = torch.load(folder / "engine.pt", map_location=self.world.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _loss(self, batch: Any) -> Tensor:
        forward = self._ddp if self._ddp is not None else self._step_loss
        with self._autocast():
            return forward(self._place(batch))

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.spec.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _place(self, batch: Any) -> Any:
        double = self.spec.precision == "float64"

        def move(tensor: Tensor) -> Tensor:
            dtype = torch.float64 if double and tensor.is_floating_point() else None
            return tensor.to(self.world.device, dtype=dtype, non_blocking=True)

        return map_tensors(move, batch)

    def _clipped_norm(self) -> Tensor:
        """The norm of the mean gradient, which is then clipped; a non-finite one is the same on every rank."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self._clip, norm)
        return norm

    def _wrap(self) -> DistributedDataParallel:
        """DDP with its buckets settled.

        DDP regroups its buckets after the first backward, by the order in which gradients arrived. The order of a
        sum over three or more ranks depends on the grouping, so a resumed run would differ in the last bits from
        one that was never stopped. A first backward through zeros, before any data, fixes the grouping for both.
        """
        cuda = self.world.device.type == "cuda"
        ddp = DistributedDataParallel(
            self._step_loss,
            device_ids=[self.world.device.index] if cuda else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.spec.bucket_mb,  # pyright: ignore[reportArgumentType]
        )
        ddp(None).backward()
        self._optimizer.zero_grad(set_to_none=True)
        return ddp


class _StepLoss(nn.Module):
    """Model and loss as the one module that DDP wraps, so that a loss may call the model as it likes."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        if batch is None:
            return torch.stack([0.0 * p.sum() for p in self.model.parameters() if p.requires_grad]).sum()
        return self.loss(self.model, batch)


def build_optimizer(parameters: Iterator[nn.Parameter], spec: Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer of a spec; its learning rate is assigned at every update."""
    if isinstance(spec, SGD):
        return torch.optim.SGD(
            parameters, lr=0.0, momentum=spec.momentum, nesterov=spec.nesterov, weight_decay=spec.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=(spec.beta1, spec.beta2), eps=spec.eps, weight_decay=spec.weight_decay
    )


def count_rows(batch: Any) -> int:
    """Rows of a collated batch: the length of its first tensor."""
    first = next(tensors_of(batch), None)
    if first is None or first.dim() == 0:
        raise ConfigError(f"a batch of type {type(batch).__name__} holds no tensor with a row dimension")
    return first.shape[0]


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for value in batch:
            yield from tensors_of(value)


def map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same nesting with every tensor changed; named tuples stay named tuples."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return type(batch)((key, map_tensors(change, value)) for key, value in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(change, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(change, value) for value in batch)
    return batch
