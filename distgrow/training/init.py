"""Init: where the weights are that a new run begins with; importing this loads no torch."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, create_model, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.spec import Spec
from distgrow.distributed.environment import expanded

if TYPE_CHECKING:
    _From = Spec
else:  # a key that is a word of Python's own cannot be written out in a class
    _From = create_model(
        "_From",
        __base__=Spec,
        **{
            "from": (
                Annotated[str, Field(min_length=1), AfterValidator(expanded)],
                Field(
                    description="A run's folder or its URI in object storage, NAME.safetensors or NAME.pt. ~ and "
                    "$NAMES are replaced."
                ),
            )
        },
    )


class Init(_From):
    """The weights that a new run begins with. A resume does not read them again."""

    strict: bool = True
    """Refuse weights of other names or shapes. false: take those that fit, and say which do not."""
    best: bool = False
    """Of a run: the checkpoint that it has kept as its best."""
    average: bool = False
    """Of a run: the average of its parameters."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Of a run: the checkpoint of this step. Default: the newest intact one."""

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, given: Any) -> Any:
        return {"from": os.fspath(given)} if isinstance(given, str | os.PathLike) else given

    @property
    def uri(self) -> str | None:
        """Return where the run is, if it is in object storage."""
        given: str = getattr(self, "from")
        return given if "://" in given else None

    @property
    def path(self) -> Path:
        """Return where the weights are, if they are not in object storage."""
        return Path(getattr(self, "from"))

    def check(self, own: Path) -> None:
        """Check that the weights are not those of the run itself, whose folder is `own`.

        Raises:
            ConfigError: They are.
        """
        if self.uri is None and self.path.resolve().is_relative_to(own.resolve()):
            raise ConfigError(f"init.from={self.path} is in the run's own folder; go on with the run by --resume")


def init_from(
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    best: bool = False,
    average: bool = False,
    step: int | None = None,
) -> Init:
    """Return the weights that a new run begins with.

    Args:
        path: A run's folder or its URI in object storage, NAME.safetensors or NAME.pt.
        strict: Refuse weights of other names or shapes. False: take those that fit, and say which do not.
        best: Of a run: the checkpoint that it has kept as its best.
        average: Of a run: the average of its parameters.
        step: Of a run: the checkpoint of this step. None: the newest intact one.
    """
    given = {"from": os.fspath(path), "strict": strict, "best": best, "average": average, "step": step}
    return Init(**given)
