"""Shards: parameters that fully_shard has cut, seen three ways; knows no engine.

A parameter is a DTensor in its module between updates, a plain tensor of this rank's rows for the optimizer (its
shard, in the same memory), and a whole tensor that autograd sees while its unit is gathered.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from distgrow.core.errors import ConfigError
from distgrow.engine.fsdp.spec import FSDP


class Shards:
    """Cut a module's parameters, unit by unit, and keep their three forms by name."""

    def __init__(
        self, root: Any, units: list[nn.Module], spec: FSDP, mesh: DeviceMesh, make: Callable[[nn.Module], None] | None
    ) -> None:
        """Cut. Collective: every rank must call.

        Args:
            root: The module that all passes go through; its forward takes `call`.
            units: Those of its modules whose parameters are gathered together; a unit's own units come after it.
            spec: How to cut.
            mesh: The ranks.
            make: If given, called with a unit, and at last with the module, before it is cut.
        """
        self.root, self.mesh = root, mesh
        self._deferred, self._half = spec.shard == "grad_op", spec.precision == "bfloat16"
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": _precision(spec),
            "offload_policy": CPUOffloadPolicy() if spec.offload else OffloadPolicy(),
        }
        for unit in reversed(units):
            if make is not None:
                make(unit)
            fully_shard(unit, reshard_after_forward=not self._deferred, **options)
        if make is not None:
            make(root)
        fully_shard(root, reshard_after_forward=False if self._deferred else None, **options)
        self._parts: list[Any] = [part for part in root.modules() if isinstance(part, FSDPModule)]
        if spec.find_unused:
            root.set_reduce_scatter_unused_params(True)
        root(None, 0.0, call=lambda: None)  # the first of all forwards settles which module is the root
        self.rest()
        self.cut: dict[str, DTensor] = {
            name: p for name, p in root.named_parameters() if isinstance(p, DTensor)
        }  #: as modules hold them between updates
        with torch.no_grad():
            self.local = {name: _shard(p) for name, p in self.cut.items()}  #: for the optimizer, in the same memory
        whole = self._whole()
        self.whole: dict[str, nn.Parameter] = {name: whole[name] for name in self.cut}  #: as autograd sees them
        self._every, self._synced = spec.reduce == "every", True

    def _whole(self) -> dict[str, nn.Parameter]:
        """Return the parameters that a gathered unit has. They stay the same objects."""
        found: dict[str, nn.Parameter] = {}
        names = {id(part): name for name, part in self.root.named_modules()}
        for part in self._parts:
            part.unshard()
            start = f"{names[id(part)]}." if names[id(part)] else ""
            found |= {f"{start}{key}": p for key, p in part.named_parameters() if not isinstance(p, DTensor)}
            part.reshard()
        return found

    @property
    def replicas(self) -> int:
        """Return how many ranks hold each shard."""
        return self.mesh.size(0) if self.mesh.ndim == 2 else 1

    def sync(self, last: bool) -> None:
        """Let the coming backward reduce gradients, or not if it is not an update's `last`."""
        if last == self._synced:
            return
        self._synced = last
        if not self._every:
            self.root.set_requires_gradient_sync(last)
        elif self.mesh.ndim == 2:
            self.root.set_requires_all_reduce(last)
        if self._deferred:
            self.root.set_reshard_after_backward(last)

    def gather(self) -> None:
        """Gather all units, and let no pass gather or reduce anything, until `dissolve`. Collective."""
        for part in self._parts:
            part.unshard()
        self._communicates(False)

    def dissolve(self) -> None:
        """Give up what is gathered and accumulated since `gather`."""
        self._communicates(True)
        self.rest()

    def _communicates(self, does: bool) -> None:
        self.root.set_requires_gradient_sync(does)
        self.root.set_reshard_after_backward(does)
        if not self._deferred:  # the root's own parameters stay, as backward begins with them
            for part in self._parts[1:]:
                part.set_reshard_after_forward(does, recurse=False)
        self._synced = does

    def accumulated(self) -> list[int]:
        """Return the sizes of what an update needs beside a trial's gradient: two reductions, and what waits for them.

        In bfloat16 that is the gradient in float32: all of it, or this rank's shards if each micro-batch is reduced. In
        float32 it is the trial's own. If parameters are gathered anew for backward, what one unit arrives in is added.
        """
        sizes = {id(p): p.numel() for p in self.cut.values()}
        largest = max(sum(sizes.get(id(p), 0) for p in _of_unit(part)) for part in self._parts)
        arriving = [] if self._deferred else [largest]
        kept = (p.numel() for p in self.local.values()) if self._every else sizes.values()
        return [largest, largest, *arriving, *(kept if self._half else ())]

    def rest(self) -> None:
        """Give up what is gathered, and what forwards without a backward have left."""
        if hasattr(self.root, "reset_iter_state"):
            self.root.reset_iter_state()
        else:
            for part in self._parts:
                part.reshard()

    @torch.no_grad()
    def take_gradients(self) -> list[Tensor]:
        """Give the shards for the optimizer their gradients, and return these."""
        for name, cut in self.cut.items():
            gradient: Any = cut.grad
            self.local[name].grad = None if gradient is None else gradient.to_local()
        return [shard.grad for shard in self.local.values() if shard.grad is not None]

    def forget(self) -> None:
        """Drop the gradients."""
        for name, cut in self.cut.items():
            cut.grad = self.local[name].grad = None

    def spread(self, name: str, value: Tensor) -> DTensor:
        """Return the DTensor whose shard on this rank is `value`, cut as the parameter of this name."""
        cut = self.cut[name]
        return DTensor.from_local(
            value, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
        )

    @torch.no_grad()
    def gathered(self, name: str, value: Tensor | None = None) -> Tensor:
        """Return a whole parameter, or what has the shard `value` here. Collective: every rank must call."""
        cut = self.cut[name] if value is None else self.spread(name, value)
        return cut.full_tensor().detach()


class Rows:
    """See distgrow.optim.joined.Joined: a rank has some rows of each parameter."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self._names = shards, {id(shard): name for name, shard in shards.local.items()}

    def norms(self, own: Tensor) -> Tensor:
        """See Joined."""
        squares = own.square()
        dist.all_reduce(squares, group=self._shards.mesh.get_group("shard"))
        return squares.sqrt_()

    def whole(self, parameter: Tensor, value: Tensor) -> Tensor:
        """See Joined."""
        return self._shards.gathered(self._names[id(parameter)], value)

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """See Joined."""
        cut = self._shards.cut[self._names[id(parameter)]]
        alike = DTensor.from_local(whole, cut.device_mesh, [Replicate()] * cut.device_mesh.ndim, run_check=False)
        return alike.redistribute(cut.device_mesh, cut.placements).to_local()


def _of_unit(part: nn.Module) -> Iterable[nn.Parameter]:
    """Return the parameters of a unit that are in none of its own units."""
    inner = {
        id(p) for one in part.modules() if one is not part and isinstance(one, FSDPModule) for p in one.parameters()
    }
    return [p for p in part.parameters() if id(p) not in inner]


def _shard(cut: DTensor) -> nn.Parameter:
    return nn.Parameter(cut.to_local().detach(), requires_grad=cut.requires_grad)


def _precision(spec: FSDP) -> MixedPrecisionPolicy:
    if spec.precision == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def give_back(module: nn.Module, names: Mapping[str, Tensor], cut: Mapping[str, DTensor]) -> None:
    """Put whole parameters, by name, in the place of those that are cut; ties stay tied."""
    new = {id(cut[name]): nn.Parameter(value, requires_grad=cut[name].requires_grad) for name, value in names.items()}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and id(old) in new:
                part._parameters[name] = new[id(old)]


def check_trials() -> None:
    """Check that torch can give up a micro-batch that memory did not hold.

    Raises:
        ConfigError: It is too old: the next pass would wait for ranks that are not there.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ConfigError(
            "engine.max_micro=auto with engine.kind=fsdp needs FSDPModule.reset_iter_state, which torch "
            f"{torch.__version__} has not and 2.13 has: give max_micro a number, or install a newer torch"
        )


def has_room(device: torch.device, tensors: Iterable[Tensor]) -> bool:
    """Return whether a device has memory for tensors, beside what it holds, with a tenth to spare."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return sum(tensor.nbytes for tensor in tensors) <= 0.9 * free


def check_parameters(named: Mapping[str, nn.Parameter], reason: str = "engine.kind=fsdp cannot cut") -> None:
    """Check that all parameters can be cut.

    Raises:
        ConfigError: One is complex, or a single number without dimensions.
    """
    for name, parameter in named.items():
        if parameter.is_complex():
            raise ConfigError(
                f"{name} is complex, which {reason}; use engine.kind=torch, or hold it as pairs of real numbers "
                "(torch.view_as_real)"
            )
        if parameter.dim() == 0:
            raise ConfigError(
                f"{name} is a number without dimensions, which {reason}: make it a tensor of shape (1,), or use "
                "engine.kind=torch"
            )
