"""Probing: when the full gradient is measured exactly, and what beside it; pure, and measures nothing itself."""

from typing import Annotated

from pydantic import Field, model_validator

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.progress import Progress
from distgrow.core.spec import PosFloat, PosInt, Spec

#: Passes over the data set that a probe with curvature takes at least: |G|, noise, a Hessian-vector product or two.
CURVATURE_PASSES = 8


class Probing(Spec):
    """When the full gradient is measured exactly, whatever the growth does; charged to the ledger's `probe`."""

    every_epochs: PosFloat | None = None
    """Epochs between two probes, the first before the first update, one at the end. None: no probes."""
    rows: PosInt = 256
    """Rows of a probe's batch."""
    curvature: bool = False
    """Also the Hessian: L, GᵀHG/|G|², tr(HΣ), and with tr Σ the exact critical batch; dear (docs/probes.md)."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """L: power iteration ends when a product raises it by less than this share of it."""
    iterations: PosInt = 100
    """L: Hessian-vector products, at most."""
    parts: Annotated[int, Field(ge=8)] = 1024
    """Random parts of the data set, at most, that tr Σ and tr(HΣ) are estimated from; one a sample: tr Σ is exact."""

    @model_validator(mode="after")
    def _curvature_has_its_places(self) -> "Probing":
        if self.curvature and self.every_epochs is None:
            raise ConfigError("curvature=true needs places to be measured at: set every_epochs")
        return self

    def due(self, progress: Progress, epoch: int) -> bool:
        """Return whether a probe's position lies between the last probe and here. `epoch` is in samples."""
        if self.every_epochs is None:
            return False
        every = self.every_epochs * epoch
        return progress.samples // every > progress.probe_samples // every

    def due_at_the_end(self, progress: Progress) -> bool:
        """Return whether a run that ends here is probed once more."""
        return self.every_epochs is not None and progress.probe_samples < progress.samples

    def check(self, samples: int, world: int, epoch: int, sfo: int | None) -> None:
        """ConfigError where exact probes of so many samples on so many ranks cannot be, or not at these places.

        `sfo` is the budget of gradient evaluations, where it is in those.
        """
        if samples < world:
            raise ConfigError(
                f"the data set of exact probes has {counted(str(samples), 'sample')}, fewer than the "
                f"{counted(world, 'rank')}; give task.probe at least {world}, or leave it out (the training set then)"
            )
        if self.curvature and samples < 2:
            raise ConfigError("run.probe.curvature=true needs a data set of at least 2 samples: one has no noise")
        if self.every_epochs is not None and self.every_epochs * epoch < 1:
            raise ConfigError(
                f"run.probe.every_epochs={self.every_epochs:g} of {epoch} samples is less than one sample; "
                f"raise it to at least {1 / epoch:.3g}"
            )
        first = samples * (CURVATURE_PASSES if self.curvature else 1)
        if self.every_epochs is not None and sfo is not None and sfo <= first:
            least = "at least " if self.curvature else ""
            raise ConfigError(
                f"budget.sfo={sfo}: the exact probe before the first update (run.probe) takes {least}{first} "
                "gradient evaluations; raise it, or leave run.probe out"
            )
