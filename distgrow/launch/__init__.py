"""How the ranks of a run are started and resized: a launcher is a file and a member of the union `Launch`."""

from typing import Annotated, get_args

from pydantic import Field

from distgrow.core.spec import default_kind
from distgrow.launch.base import skips_keys_of_others
from distgrow.launch.local import Local
from distgrow.launch.ray.spec import Ray

_Launcher = Local | Ray

Launch = Annotated[
    _Launcher, Field(discriminator="kind"), skips_keys_of_others(*get_args(_Launcher)), default_kind("local")
]
