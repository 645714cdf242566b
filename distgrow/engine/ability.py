"""What an engine can do beside training; importing this loads no torch."""

from enum import Flag, auto

from distgrow.core.errors import ConfigError
from distgrow.optim import OptimizerSpec


class Can(Flag):
    """What only some engines can do."""

    TEST_PROGRESS = auto()  #: hold gradients against the update before
    PRECONDITION = auto()  #: measure gradients in the metric of the optimizer's steps
    MEASURE_NOISE = auto()  #: measure noise by how micro-batches differ
    MEASURE_PARAMETERS = auto()  #: measure noise parameter by parameter
    RESIZE_AVERAGE = auto()  #: go on with an average on another number of ranks
    EXTRAPOLATE = auto()  #: evaluate gradients at a shifted point
    CUT_MODEL = auto()  #: train a model that fits on no device, and has no numbers before
    PRUNE = auto()  #: keep pruned weights at 0
    REPEAT = auto()  #: make the same updates in every run, as gradients are applied in the order of their batches
    LEAVE_OUT = auto()  #: train where some ranks have no sample


def check_skips(ahead: int, optimizer: OptimizerSpec) -> None:
    """Check that an optimizer can make the steps of an engine with `ahead`: with 0, all can.

    Raises:
        ConfigError: It cannot.
    """
    if ahead and not optimizer.skips_on_device:
        raise ConfigError(
            f"engine.ahead={ahead} needs an optimizer that can skip a step on the device, which "
            f"optimizer.kind={optimizer.name} cannot: use optimizer.kind sgd, adamw or muon, or set engine.ahead=0"
        )
