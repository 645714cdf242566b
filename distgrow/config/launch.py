"""Launch: how a run's processes are started, as a config says it; starts nothing itself."""

from typing import Annotated, Literal

from pydantic import Field

from distgrow.core.pace import Pace, Seconds
from distgrow.core.scaling import Workers
from distgrow.core.spec import Spec


class Launch(Spec):
    """How processes are started. Under torchrun this is ignored: the group that is there is joined."""

    kind: Literal["local", "ray"] = "local"
    """local: here; ray: through Ray Train."""
    workers: Workers = 1
    """Ranks: 4, as many as the batch fills with micro-batches within [1, 8], or {0: 1, 3: 4} from stage to stage."""
    address: str | None = None
    """Ray: address of a cluster, or auto for the one on this host; none: the one in RAY_ADDRESS, or a new local one."""
    max_failures: Annotated[int, Field(ge=0)] = 0
    """Failures of workers (several local ones, or Ray's) that a run survives: it goes on from its newest checkpoint."""
    backoff_s: Seconds = 1.0
    """Seconds before a run that failed goes on; twice as many after each further failure without a new checkpoint."""
    timeout_s: Annotated[float, Field(ge=1, le=10**7)] = 600.0
    """Seconds that a rank waits for the others before it gives up and says who stayed away."""
    storage_path: str | None = None
    """Where checkpoints, config and metrics are kept, below a folder of the run's name, by a URI of pyarrow's (s3://…,
    gs://…, hdfs://…, file://…); none: in run.dir, which every host must see."""
    resources_per_worker: dict[str, float] = {}
    """Ray: what each worker takes; default one CPU, and one GPU where engine.device asks for it or finds one."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray: workers on as few hosts as possible, or one on each (STRICT_…: nothing else will do)."""
    resize_wait_s: Seconds = 120.0
    """Ray: seconds to wait for as many workers as a stage wants; the run then goes on with those that it can have."""
    pace: Pace | None = None
    """How fast the run goes, if known: `plan` then tells seconds, worker-seconds and what resizing saves."""

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change with the stage."""
        return not isinstance(self.workers, int)
