"""Which parameters take part in a loss: where it must be all of them, or the same ones in every micro-batch."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World


class UsedParameters:
    """Watch which parameters get a gradient.

    DeepSpeed reduces gradients in the order in which they come. If ranks, or micro-batches of a rank, use different
    parameters, it adds up gradients of different ones, and says so only if their sizes differ. So does fully_shard.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], world: World, kind: str = "deepspeed") -> None:
        self._names, self._world, self._kind = list(named), world, kind
        self._seen = set[int]()  # of the micro-batch under way
        self._first: set[int] | None = None
        self._agreed = False
        self._hooks: list[RemovableHandle] = [
            parameter.register_hook(partial(self._see, k)) for k, parameter in enumerate(named.values())
        ]

    def _see(self, number: int, gradient: Tensor) -> None:
        del gradient
        self._seen.add(number)

    def begin(self) -> None:
        """Begin a micro-batch."""
        self._seen = set()

    def end(self) -> None:
        """End a micro-batch.

        Raises:
            ConfigError: It has used other parameters than the first one.
        """
        if self._first is None:
            self._first = self._seen
        self._check(self._first)

    def agree(self) -> None:
        """Check, once, that all ranks use the same parameters. Collective: every rank must call.

        Raises:
            ConfigError: They do not.
        """
        if self._agreed or self._first is None:
            return
        self._agreed = True
        for used in self._world.gather(self._first):
            self._check(used)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _check(self, used: set[int]) -> None:
        if used == self._seen:
            return
        names = [self._names[k] for k in sorted(used ^ self._seen)]
        shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        raise ConfigError(
            f"the loss depends on {shown} in some micro-batches alone, which engine.kind={self._kind} cannot reduce"
            f": use engine={{kind: {'fsdp' if self._kind == 'fsdp' else 'torch'}, find_unused: true}}, or let every "
            "parameter take part, as loss + 0 * parameter.sum()"
        )


def check_gradients(objective: nn.Module, *, every: bool) -> None:
    """Check that the gradients of an update are dense and, with `every`, that all trained parameters have one.

    Raises:
        ConfigError: They are not, or parameters had none, for which DDP would wait.
    """
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    sparse = [name for name, parameter in named if parameter.grad is not None and parameter.grad.is_sparse]
    if sparse:
        raise ConfigError(f"the gradient of {_some(sparse)} is sparse, and has no norm: set sparse=False there")
    unused = [name for name, parameter in named if parameter.grad is None]
    if unused and every:
        raise ConfigError(
            f"the loss does not depend on {_some(unused)}, and several ranks need every gradient: set "
            "requires_grad=False there, or engine.find_unused=true if it does in other updates, or train in one process"
        )


def _some(names: list[str]) -> str:
    """Return the first few names, without what the engine has put before them."""
    shown = [name.removeprefix("model.") for name in names[:5]]
    return ", ".join(shown) + (" …" if len(names) > 5 else "")
