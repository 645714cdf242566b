"""Model, loss and data behind a spec: built in, or the user's own."""

from typing import Annotated

from pydantic import Field

from distgrow.tasks.builtin import Cifar10, Digits, Text
from distgrow.tasks.corpus import Corpus
from distgrow.tasks.hf import HuggingFace
from distgrow.tasks.raven import Raven
from distgrow.tasks.user import Target

TaskSpec = Annotated[Digits | Cifar10 | Text | Corpus | HuggingFace | Raven | Target, Field(discriminator="kind")]
