"""Model and loss as one module, and what is checked of them before they train; knows no engine."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distgrow.core.errors import ConfigError
from distgrow.engine.batches import Loss, checked_loss, in_precision, leaves_of
from distgrow.optim import OptimizerSpec
from distgrow.optim.direction import real


class WeightedLoss(nn.Module):
    """Join model and loss in one module, so that a loss may call the model as it likes wherever the module is wrapped.

    A loss that is a module itself brings parameters and buffers of its own.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def trained(self) -> list[nn.Parameter]:
        """Return the model's parameters, then the loss's own."""
        own = self.loss.parameters() if isinstance(self.loss, nn.Module) else ()
        return list(dict.fromkeys([*self.model.parameters(), *own]))

    def named(self) -> dict[str, nn.Parameter]:
        """Return the parameters that `trained` returns by name: the loss's own have "loss." before it."""
        whole = dict(self.named_parameters())
        short = {name.removeprefix("model."): parameter for name, parameter in whole.items()}
        return short if len(short) == len(whole) else whole  # whole if the model has a part that is called loss

    def averaged(self) -> dict[str, Tensor]:
        """Return what an average of the parameters is made of: those that are trained, and all buffers, by name."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return {**trained, **dict(self.named_buffers())}

    def forward(self, batch: Any, weight: float, *, without_loss: bool = False) -> Tensor:
        """Return the batch's mean loss times `weight`; without a batch, `weight` through all that has a gradient.

        Args:
            batch: A collated batch.
            weight: The factor of the loss.
            without_loss: Return `weight` through what the model returns for the batch, whose loss may be 0/0.
        """
        if batch is not None and without_loss:
            return weight * self._outputs(batch)
        if batch is None:
            return torch.stack([(weight * real(p)).sum() for p in self.trained() if p.requires_grad]).sum()
        return checked_loss(self.loss(self.model, batch)) * weight

    def _outputs(self, batch: Any) -> Tensor:
        """Return the sum of what the model returns when the loss of a batch calls it, but for a loss that is 0/0.

        Raises:
            ConfigError: The loss does not call the model, or only parts of it.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, given: Any, returned: Any) -> None:
            tensors = (leaf for leaf in leaves_of(returned) if isinstance(leaf, Tensor) and leaf.requires_grad)
            seen.extend(real(tensor).float().sum() for tensor in tensors if tensor.isfinite().all())

        hook = self.model.register_forward_hook(keep)
        try:
            self.loss(self.model, batch)
        finally:
            hook.remove()
        if not seen:
            raise ConfigError(
                "items counted 0 in a micro-batch, and the loss calls parts of the model or gets nothing finite from "
                "it, so engine.zero=3 cannot take part in the update: let the loss call model(…), or use zero=2"
            )
        return torch.stack(seen).sum()


def penalties_of(objective: WeightedLoss, optimizer: OptimizerSpec) -> dict[str, float]:
    """Return λ of each parameter's L2 penalty, by its name in `objective`."""
    named = objective.named()
    penalties = {named[name]: penalty for name, penalty in optimizer.penalties(named).items()}
    return {name: penalties[parameter] for name, parameter in objective.named_parameters() if parameter in penalties}


class SingleRow(ConfigError):
    """BatchNorm was to train on a micro-batch of one row."""


def check_single_row(error: ValueError, where: str = "a micro-batch has one row") -> None:
    """Check that `error` is not what torch's BatchNorm raises for a single row.

    Raises:
        SingleRow: It is. The message says what a user can do.
    """
    if not isinstance(error, ConfigError) and "more than 1 value per channel" in str(error):
        raise SingleRow(
            f"{where}, and BatchNorm cannot train on one value per channel: give each rank at least two rows a "
            "micro-batch, by a larger growth.start, fewer ranks (launch.workers) or engine.max_micro of at least 3, or "
            "use a norm of single rows (model.norm=group, nn.GroupNorm)"
        ) from error


def check_leaves(loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Check that a loss depends on no trainable parameters but these.

    Raises:
        ConfigError: It depends on others, which nobody would train or keep in checkpoints.
    """
    known, seen, coming = {id(parameter) for parameter in parameters}, set[Any](), [loss.grad_fn]
    others: list[tuple[int, ...]] = []
    while coming:
        node = coming.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            others.append(tuple(leaf.shape))
        coming += [following for following, _ in node.next_functions]
    if others:
        raise ConfigError(
            f"the loss depends on {len(others)} trainable parameters, of shape {', '.join(map(str, others[:3]))}, that "
            "are neither the model's nor the loss's own: they would not be trained; make the loss an nn.Module that "
            "has them, or set requires_grad=False"
        )


def check_dense(objective: WeightedLoss) -> None:
    """Check that no embedding makes sparse gradients.

    Raises:
        ConfigError: One does: norms, averages over ranks and shards of gradients need dense ones.
    """
    for name, module in objective.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ConfigError(
                f"{name.removeprefix('model.')} is {type(module).__name__}(sparse=True), whose gradients have no norm, "
                "which every update needs: set sparse=False"
            )


def on_meta(module: nn.Module) -> bool:
    """Return whether a module has parameters without numbers, on the meta device."""
    return any(parameter.is_meta for parameter in module.parameters())


def to_precision(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a module to a device, its floating-point and complex numbers to the precision `dtype`, in place."""
    module._apply(lambda tensor: tensor.to(device, in_precision(tensor, dtype) or tensor.dtype))


def empty_copy(model: nn.Module, loss: Loss) -> WeightedLoss | ConfigError:
    """Copy model and loss in eval mode, with parameters and buffers without content; what they tie stays tied.

    Returns:
        The copy, or why there is none, for whoever needs it to raise.
    """
    joined, empty = WeightedLoss(model, loss), dict[int, Any]()
    for parameter in joined.parameters():
        meta = torch.empty_like(parameter, device="meta")
        empty[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in joined.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        copied = copy.deepcopy(model, empty)
        return WeightedLoss(copied, copy.deepcopy(loss, empty) if isinstance(loss, nn.Module) else loss).eval()
    except Exception as error:
        return ConfigError(
            f"the model cannot be copied, which exact probes need: {error}; take out of it what cannot be, or leave "
            "run.probe and growth by exact norms out"
        )


def apart(model: nn.Module, loss: Loss, device: torch.device) -> tuple[nn.Module, Loss]:
    """Return model and loss for another process: themselves, or copies on the CPU if they are elsewhere."""
    if device.type == "cpu":
        return model, loss
    copied: tuple[nn.Module, Any] = copy.deepcopy((model, loss))
    return copied[0].cpu(), copied[1].cpu() if isinstance(copied[1], nn.Module) else copied[1]


def compile_in_place(model: nn.Module) -> None:
    """Compile what a call of the model does, hooks included; nn.Module.compile passes torch's own containers over."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    model._compiled_call_impl = torch.compile(call)
