"""Ray: the launcher that trains on a Ray cluster; importing this loads no ray."""

from collections.abc import Sequence
from typing import Literal

from pydantic import model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.pace import Seconds
from distgrow.launch.base import Job, LauncherSpec
from distgrow.run.resume_mode import ResumeMode


class Ray(LauncherSpec):
    """On a Ray cluster, through Ray Train."""

    kind: Literal["ray"] = "ray"
    address: str | None = None
    """Address of a cluster, or auto for the one on this host. Default: RAY_ADDRESS, else a new local one."""
    resources_per_worker: dict[str, float] = {}
    """Resources of each worker. Default: one CPU, and one GPU if engine.device wants one or finds one."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """PACK: workers on as few hosts as possible. SPREAD: on as many. STRICT_…: on one host, or one on each."""
    resize_wait_s: Seconds = 120.0
    """Seconds to wait for as many workers as a stage wants. After that the run goes on with those that fit."""

    @model_validator(mode="after")
    def _groups_share_a_folder(self) -> "Ray":
        if self.elastic and self.storage_path is not None:
            raise ConfigError(
                f"launch.workers={self.workers} changes with the stage, for which all hosts must see run.dir: "
                "leave launch.storage_path out, or give launch.workers one number"
            )
        return self

    def train(self, job: Job, *, resume: ResumeMode, rebudget: bool, command: Sequence[str]) -> int:
        """See LauncherSpec. Workers of other hosts get the config, and not the command."""
        try:
            from distgrow.launch.ray import driver
        except ImportError as error:
            raise ConfigError(f"launch.kind=ray needs the extra 'ray': pip install 'distgrow[ray]' ({error})") from None

        driver.train(job, resume=resume, rebudget=rebudget)
        return 0
