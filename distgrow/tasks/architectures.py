"""Architectures: specs of the built-in models, and the inputs that they take. Loads no torch."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distgrow.core.active_experts import ActiveExperts, ExpertWeights
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
    causal: bool = True  #: whether tokens are seen by later ones alone


Inputs = Images | Tokens
#: Weight of the experts' balance in the loss.
BALANCE = 0.01


def _none_if_0(value: Any) -> Any:
    """Return None for the number 0."""
    return None if type(value) is int and value == 0 else value


class Softmax(Spec):
    """Softmax regression."""

    kind: Literal["softmax"] = "softmax"

    def build(self, inputs: Inputs) -> "nn.Module":
        """Build the model for these inputs. Raise ConfigError if it does not fit them."""
        from distgrow.tasks import models

        images = _images(self, inputs)
        return models.softmax_regression(images.channels * images.height * images.width, images.classes)


class MLP(Spec):
    """ReLU layers."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[PosInt] = [128, 64]
    """Widths of the hidden layers."""

    def build(self, inputs: Inputs) -> "nn.Module":
        """Build the model for these inputs. Raise ConfigError if it does not fit them."""
        from distgrow.tasks import models

        images = _images(self, inputs)
        return models.mlp(images.channels * images.height * images.width, self.hidden, images.classes)


class ResNet(Spec):
    """CIFAR ResNets."""

    kind: Literal["resnet8", "resnet20", "resnet18"] = "resnet8"
    norm: Literal["batch", "sync_batch", "group"] = "group"
    """batch: statistics of each micro-batch; sync_batch: of one micro-batch of all ranks (GPU); group: of a sample."""

    def build(self, inputs: Inputs) -> "nn.Module":
        """Build the model for these inputs. Raise ConfigError if it does not fit them."""
        from distgrow.tasks import models

        images = _images(self, inputs)
        norm = {"batch": models.batch_norm, "sync_batch": models.sync_batch_norm, "group": models.group_norm}[self.norm]
        if self.kind == "resnet18":
            return models.resnet(images.channels, images.classes, widths=[64, 128, 256, 512], blocks=2, norm=norm)
        blocks = 1 if self.kind == "resnet8" else 3
        return models.resnet(images.channels, images.classes, widths=[16, 32, 64], blocks=blocks, norm=norm)


class GPT(Spec):
    """A small transformer: decoder-only for text and corpora, every token seeing every other one for puzzles.

    With `experts`, each block has that many MLPs with a router in place of one. A token uses the `active` experts whose
    logits are largest, weighted by a softmax over these logits alone.
    """

    kind: Literal["gpt"] = "gpt"
    layers: PosInt = 4
    """Transformer blocks."""
    width: PosInt = 128
    """Size of an embedding."""
    heads: PosInt = 4
    """Attention heads; they divide the width."""
    dropout: Fraction = 0.0
    """Dropped share of activations while training."""
    positions: Literal["learned", "rotary"] = "learned"
    """learned: a vector for each place, added to the tokens'; rotary: queries and keys turned by their place, which
    needs an even width of a head."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """gelu: two layers, 4 × the width between them; swiglu: a gated layer of 8/3 × the width, without biases."""
    tied: bool = True
    """Whether the output layer has the weights of the tokens' embedding."""
    checkpoint_blocks: Literal["none", "all", "second"] = "none"
    """Blocks whose activations are computed again for the gradient, in place of being kept: none, all, or every second
    one. Same gradients, less memory, up to a third more time."""
    experts: Annotated[PosInt | None, BeforeValidator(_none_if_0)] = None
    """Experts of a block, each an MLP. Default, or 0: one MLP and no router."""
    active: PosInt | ActiveExperts | None = None
    """Experts that a token uses, at most `experts`; or from `start` to `end` over the budget's samples."""
    capacity: float | None = None
    """Tokens of a sample that an expert takes, as a multiple of their even share, at least 1; further ones pass it by.
    Default: all."""
    balance: Annotated[float, Field(ge=0)] | None = None
    """Weight in the loss of the uneven load of experts, T·Σ f·p̄ of each sample. Default: 0.01 with experts."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "GPT":
        _check_experts(self)
        return self

    def build(self, inputs: Inputs) -> "nn.Module":
        """Build the model for these inputs. Raise ConfigError if it does not fit them."""
        from distgrow.tasks import models

        check_model(self, type(inputs))
        assert isinstance(inputs, Tokens)
        names = ("layers", "width", "heads", "dropout", "positions", "tied", "checkpoint_blocks")
        shape = {name: getattr(self, name) for name in names}
        return models.GPT(inputs.vocabulary, inputs.length, causal=inputs.causal, **shape, **self._feed())

    def expert_weights(self) -> ExpertWeights | None:
        """Return the weights of the kernels of all blocks; None without experts."""
        if self.experts is None or self.active is None:
            return None
        active = ActiveExperts(start=self.active, end=self.active) if isinstance(self.active, int) else self.active
        each = 8 * self.width**2 if self.mlp == "gelu" else 3 * self.width * swiglu_width(self.width)
        shared = 4 * self.width**2 + self.experts * self.width  # attention and router
        return ExpertWeights(shared=self.layers * shared, each=self.layers * each, experts=self.experts, active=active)

    def _feed(self) -> dict[str, Any]:
        """Return what makes the feed-forward layers: one MLP in each block, or experts."""
        from distgrow.tasks import experts, models

        make = {"gelu": models.feed_forward, "swiglu": models.SwiGLU}[self.mlp]
        if self.experts is None or self.active is None:
            return {"feed": make}
        active = experts.Active(self.active if isinstance(self.active, int) else self.active.start)
        coefficient = BALANCE if self.balance is None else self.balance
        settings = {"count": self.experts, "active": active, "capacity": self.capacity, "coefficient": coefficient}
        settings["make"] = make
        return {"active": active, "feed": partial(models.experts, **settings)}


def swiglu_width(width: int) -> int:
    """Return the inner width of a SwiGLU layer, 8/3 of the outer one, rounded up to a multiple of 8."""
    return -(-8 * width // 24) * 8


def _check_experts(model: GPT) -> None:
    """Check that the settings of experts go together. Raise ConfigError if they do not."""
    given = {"active": model.active, "capacity": model.capacity, "balance": model.balance}
    if model.experts is None:
        if others := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{others[0]} is of experts, and the model has none: give experts=8, or leave it out")
        return
    if model.checkpoint_blocks != "none":
        raise ConfigError(
            f"checkpoint_blocks={model.checkpoint_blocks} computes blocks again after the loss has read the balance of "
            f"experts={model.experts}: leave out one of both"
        )
    if model.active is None:
        raise ConfigError(f"experts={model.experts} needs active, how many of them a token uses: give active=2")
    most = model.active if isinstance(model.active, int) else model.active.most
    if most > model.experts:
        raise ConfigError(f"active={most} exceeds experts={model.experts}: a token can use all at most")
    if model.capacity is not None and model.capacity < 1:
        raise ConfigError(
            f"capacity={model.capacity:g} is below 1: tokens would be dropped even if the load was even; give at least "
            "1, such as 1.25, or leave it out"
        )


def _check_gpt(model: GPT) -> None:
    """Check that a transformer's sizes go together. Raise ConfigError if they do not."""
    if model.width % model.heads:
        raise ConfigError(f"model.heads={model.heads} does not divide model.width={model.width}")
    if model.positions == "rotary" and model.width // model.heads % 2:
        raise ConfigError(
            f"model.positions=rotary turns pairs of numbers, but model.width={model.width} has "
            f"{model.width // model.heads} for each of model.heads={model.heads}: allowed are even ones; give another "
            "width or number of heads, or positions=learned"
        )


Model = Annotated[Softmax | MLP | ResNet | GPT, Field(discriminator="kind")]


def check_model(model: Model, inputs: type[Inputs]) -> None:
    """Check that a model takes a task's inputs.

    Raises:
        ConfigError: It does not, or its sizes do not go together.
    """
    if isinstance(model, GPT):
        if inputs is not Tokens:
            raise ConfigError(
                "model.kind=gpt needs task.kind=text, corpus or raven; for images use softmax, mlp or a resnet"
            )
        _check_gpt(model)
    elif inputs is not Images:
        raise ConfigError(
            f"model.kind={model.kind} needs images; for task.kind=text, corpus or raven use model.kind=gpt"
        )


def _images(model: Model, inputs: Inputs) -> Images:
    check_model(model, type(inputs))
    assert isinstance(inputs, Images)
    return inputs
