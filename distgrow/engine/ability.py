"""What an engine can do beside training; importing this loads no torch."""

from enum import Flag, auto


class Can(Flag):
    """What only some engines can do."""

    TEST_PROGRESS = auto()  #: hold gradients against the update before
    PRECONDITION = auto()  #: measure gradients in the metric of the optimizer's steps
    MEASURE_PARAMETERS = auto()  #: measure noise parameter by parameter
    RESIZE_AVERAGE = auto()  #: go on with an average on another number of ranks
    EXTRAPOLATE = auto()  #: evaluate gradients at a shifted point
    CUT_MODEL = auto()  #: train a model that fits on no device, and has no numbers before
    PRUNE = auto()  #: keep pruned weights at 0
