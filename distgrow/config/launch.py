"""Launch: the keys of a config that decide how processes are started. Starts none."""

from typing import Annotated, Literal

from pydantic import Field

from distgrow.core.pace import Pace, Seconds
from distgrow.core.scaling import Workers
from distgrow.core.spec import Spec


class Launch(Spec):
    """How processes are started. Under torchrun this is ignored, as torchrun has started them."""

    kind: Literal["local", "ray"] = "local"
    """local: on this host. ray: on a Ray cluster, through Ray Train."""
    workers: Workers = 1
    """Number of ranks: 4, or from stage to stage {0: 1, 3: 4}, or within [1, 8] as many as full micro-batches need."""
    address: str | None = None
    """Ray: address of a cluster, or auto for the one on this host. Default: RAY_ADDRESS, else a new local one."""
    max_failures: Annotated[int, Field(ge=0)] = 0
    """How many failures of a group of workers a run survives. After each it resumes from its newest checkpoint."""
    backoff_s: Seconds = 1.0
    """Seconds to wait before a failed run resumes. They double with each further failure without a new checkpoint."""
    timeout_s: Annotated[float, Field(ge=1, le=10**7)] = 600.0
    """Seconds that a rank waits for the others before it fails and names the missing ones."""
    storage_path: str | None = None
    """URI of the storage for checkpoints, config and metrics (s3://…, gs://…, hdfs://…, file://…), in a folder of the
    run's name there. Default: run.dir, which every host must see."""
    resources_per_worker: dict[str, float] = {}
    """Ray: resources of each worker. Default: one CPU, and one GPU if engine.device wants one or finds one."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray: PACK: workers on as few hosts as possible. SPREAD: on as many. STRICT_…: on one host, or one on each."""
    resize_wait_s: Seconds = 120.0
    """Ray: seconds to wait for as many workers as a stage wants. After that the run goes on with those that fit."""
    pace: Pace | None = None
    """Speed of the run, if known. `plan` then prints seconds, worker-seconds and what resizing saves."""

    @property
    def elastic(self) -> bool:
        """Return whether the number of workers may change with the stage."""
        return not isinstance(self.workers, int)
