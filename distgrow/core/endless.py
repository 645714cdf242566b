"""Training sets without a length: they have no epochs, so nothing of a run may be measured in them. Pure."""

from collections.abc import Iterator, Mapping

from distgrow.core.errors import ConfigError
from distgrow.core.spec import Spec
from distgrow.core.stages import LONGEST, Every, Stages

#: The samples of an epoch if the training set has no length: more than any run has.
ENDLESS = LONGEST
#: The stages of a run whose batch never grows, in place of the default, which is in epochs.
ONE_STAGE = Stages(every=Every(samples=LONGEST))


def refuse_epochs(specs: Mapping[str, Spec | None]) -> None:
    """Check that nothing is measured in epochs.

    Args:
        specs: The settings, by their keys of a config.

    Raises:
        ConfigError: A key is; the message names it.
    """
    for name, spec in specs.items():
        for key, value in _in_epochs(name, spec):
            raise ConfigError(
                f"{key}={value}: the training set is a stream without a length, which has no epochs; "
                "give samples or steps, or let the data set have a __len__"
            )


def _in_epochs(name: str, spec: object) -> Iterator[tuple[str, object]]:
    """Yield the keys of a spec that are given in epochs, and their values."""
    if not isinstance(spec, Spec):
        return
    for key in type(spec).model_fields:
        value = getattr(spec, key)
        if value is not None and (key == "epochs" or key.endswith("_epochs")):
            yield f"{name}.{key}", value
        yield from _in_epochs(f"{name}.{key}", value)
