"""Architectures: specs of the built-in models, and the inputs that they take. Loads no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from distgrow.core.errors import ConfigError
from distgrow.core.spec import Fraction, PosInt, Spec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A classification task's inputs: (rows, channels, height, width) → classes."""

    channels: int
    height: int
    width: int
    classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A language model's inputs: (rows, length) of tokens below `vocabulary`."""

    length: int
    vocabulary: int


Inputs = Images | Tokens


class Softmax(Spec):
    """Softmax regression."""

    kind: Literal["softmax"] = "softmax"

    def build(self, inputs: Inputs) -> "nn.Module":
        """Build the model for these inputs. Raise ConfigError if it does not fit them."""
        from distgrow.tasks import models

        images = _images(self.kind, inputs)
        return models.softmax_regression(images.channels * images.height * images.width, images.classes)


class MLP(Spec):
    """ReLU layers."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[PosInt] = [128, 64]
    """Widths of the hidden layers."""

    def build(self, inputs: Inputs) -> "nn.Module":
        """Build the model for these inputs. Raise ConfigError if it does not fit them."""
        from distgrow.tasks import models

        images = _images(self.kind, inputs)
        return models.mlp(images.channels * images.height * images.width, self.hidden, images.classes)


class ResNet(Spec):
    """CIFAR ResNets."""

    kind: Literal["resnet8", "resnet20", "resnet18"] = "resnet8"
    norm: Literal["batch", "sync_batch", "group"] = "group"
    """batch: statistics of each micro-batch; sync_batch: of one micro-batch of all ranks (GPU); group: of a sample."""

    def build(self, inputs: Inputs) -> "nn.Module":
        """Build the model for these inputs. Raise ConfigError if it does not fit them."""
        from distgrow.tasks import models

        images = _images(self.kind, inputs)
        norm = {"batch": models.batch_norm, "sync_batch": models.sync_batch_norm, "group": models.group_norm}[self.norm]
        if self.kind == "resnet18":
            return models.resnet(images.channels, images.classes, widths=[64, 128, 256, 512], blocks=2, norm=norm)
        blocks = 1 if self.kind == "resnet8" else 3
        return models.resnet(images.channels, images.classes, widths=[16, 32, 64], blocks=blocks, norm=norm)


class GPT(Spec):
    """A small decoder-only transformer."""

    kind: Literal["gpt"] = "gpt"
    layers: PosInt = 4
    """Transformer blocks."""
    width: PosInt = 128
    """Size of an embedding."""
    heads: PosInt = 4
    """Attention heads; they divide the width."""
    dropout: Fraction = 0.0
    """Dropped share of activations while training."""

    def build(self, inputs: Inputs) -> "nn.Module":
        """Build the model for these inputs. Raise ConfigError if it does not fit them."""
        from distgrow.tasks import models

        if not isinstance(inputs, Tokens):
            raise ConfigError("model.kind=gpt needs task.kind=text; for images use softmax, mlp or a resnet")
        if self.width % self.heads:
            raise ConfigError(f"model.heads={self.heads} does not divide model.width={self.width}")
        shape = {"layers": self.layers, "width": self.width, "heads": self.heads, "dropout": self.dropout}
        return models.GPT(inputs.vocabulary, inputs.length, **shape)


Model = Annotated[Softmax | MLP | ResNet | GPT, Field(discriminator="kind")]


def _images(kind: str, inputs: Inputs) -> Images:
    if not isinstance(inputs, Images):
        raise ConfigError(f"model.kind={kind} needs images; for task.kind=text use model.kind=gpt")
    return inputs
