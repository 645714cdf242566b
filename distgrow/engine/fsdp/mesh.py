"""The mesh of ranks that parameters are cut over; knows no engine."""

import socket
from collections import Counter

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distgrow.core.errors import ConfigError
from distgrow.distributed.world import World
from distgrow.engine.fsdp.spec import FSDP


def mesh_of(spec: FSDP, world: World) -> DeviceMesh:
    """Return all ranks in a row, or for `hybrid` a row for each replica. Collective: every rank must call.

    Raises:
        ConfigError: Replicas do not divide the ranks, or `hybrid` finds one host and no `replicas`.
    """
    kind, replicas = world.device.type, replicas_of(spec, world)
    if replicas is None:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard"))


def replicas_of(spec: FSDP, world: World) -> int | None:
    """Return how many times the parameters are held; None: once, by all ranks. Collective: every rank must call.

    Raises:
        ConfigError: As in `mesh_of`.
    """
    spec.check_ranks(world.size)
    return (spec.replicas or hosts(world.gather(socket.gethostname()))) if spec.shard == "hybrid" else None


def hosts(names: list[str]) -> int:
    """Return the number of hosts, from the name of each rank's.

    Raises:
        ConfigError: There is one, or they have not equally many ranks, side by side.
    """
    counts = Counter(names)
    if len(counts) == 1:
        raise ConfigError(
            "engine.shard=hybrid holds the parameters once a host, and all ranks are on one: give engine.replicas, or "
            "use shard=full"
        )
    here = len(names) // len(counts)
    if any(len(set(names[k : k + here])) != 1 for k in range(0, len(names), here)) or len(set(counts.values())) > 1:
        raise ConfigError(
            f"engine.shard=hybrid needs equally many ranks on each host, side by side; they have "
            f"{', '.join(map(str, counts.values()))}: give engine.replicas, or use shard=full"
        )
    return len(counts)
