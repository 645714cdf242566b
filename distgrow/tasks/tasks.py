"""Tasks: a spec → model, loss, training and test data, built in or by the user's own function."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from distgrow.core.spec import ConfigError, PosInt, Spec
from distgrow.data import files
from distgrow.tasks.architectures import GPT, MLP, Images, Model, ResNet, Tokens

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained, on what. A user's own `task.target` returns this, or (model, loss, train[, test])."""

    model: "nn.Module"
    loss: "Callable[[nn.Module, Any], Tensor]"  #: (model, collated batch) → mean over its rows
    train: Any  #: map-style data set
    test: Any = None  #: map-style data set, or none
    probe: Any = None  #: map-style data set of exact probes, where `train` augments; default: train
    metrics: "Callable[[nn.Module, Any], dict[str, Tensor]] | None" = None  #: means over rows; default: the loss
    collate: Callable[[list[Any]], Any] | None = None  #: rows → batch; default: torch's


# ── tasks ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Digits(Spec):
    """scikit-learn's handwritten digits, embedded: 1,437 to train on, 360 to test on."""

    kind: Literal["digits"] = "digits"

    def train_size(self) -> int:
        """Samples of the training set, found without loading it."""
        return 1437

    def build(self, model: Model | None) -> Task:
        """Model, loss and data."""
        from distgrow.data import datasets

        train, test = datasets.digits()
        return _classification((model or MLP()).build(Images(channels=1, height=8, width=8, classes=10)), train, test)


class Cifar10(Spec):
    """CIFAR-10 from a folder of Parquet files in the Hugging Face layout; cropped and flipped at random."""

    kind: Literal["cifar10"] = "cifar10"
    path: str = "data/cifar10"
    """Folder with …train….parquet and …test….parquet."""
    subset: PosInt | None = None
    """Use only this many training images, the first ones."""
    augment: bool = True
    """Random shifts by up to 4 pixels and mirroring."""

    def train_size(self) -> int:
        """Samples of the training set, found without loading it."""
        rows = files.parquet_rows(files.parquet_files(Path(self.path), "train"))
        return rows if self.subset is None else min(rows, self.subset)

    def build(self, model: Model | None) -> Task:
        """Model, loss and data."""
        from distgrow.data import datasets

        parts = [files.parquet_files(Path(self.path), part) for part in ("train", "test")]
        train = datasets.Images(*files.parquet_images(parts[0], limit=self.subset), augment=self.augment)
        test = datasets.Images(*files.parquet_images(parts[1], limit=None), augment=False)
        images = Images(channels=3, height=train.height, width=train.width, classes=10)
        return _classification((model or ResNet()).build(images), train, test, probe=train.plain())


class Text(Spec):
    """Next-token prediction on a text; by default on the sources of Python's standard library."""

    kind: Literal["text"] = "text"
    path: Annotated[str, Field(min_length=1)] | None = None
    """A text file or a folder."""
    pattern: str = "*"
    """Which files of a folder to read."""
    level: Literal["byte", "character"] = "byte"
    """What a token is."""
    length: PosInt = 64
    """Tokens of one sample."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the text, its end, that is held out."""

    def train_size(self) -> int:
        """Samples of the training set."""
        return (len(self._split()[0]) - 1) // self.length

    def build(self, model: Model | None) -> Task:
        """Model, loss and data."""
        from distgrow.data import datasets

        train, test, vocabulary = self._split()
        built = (model or GPT()).build(Tokens(length=self.length, vocabulary=vocabulary))
        return _classification(built, datasets.Tokens(train, self.length), datasets.Tokens(test, self.length))

    def _split(self) -> tuple[Any, Any, int]:
        text = files.read_text(Path(self.path) if self.path else None, self.pattern)
        stream, vocabulary = files.tokens(text, characters=self.level == "character")
        cut = int(len(stream) * (1 - self.test))
        train, test = stream[:cut], stream[cut:]
        if min(len(train), len(test)) <= self.length:
            raise ConfigError(
                f"task.path={self.path}: {len(stream)} tokens are too few for task.length={self.length} "
                f"with task.test={self.test} held out; use more text or a smaller length"
            )
        return train, test, vocabulary


class Target(Spec):
    """Your own model, loss and data, from a function of yours."""

    kind: Literal["target"] = "target"
    target: str
    """package.module:function; it returns a distgrow.Task or (model, loss, train[, test])."""
    args: dict[str, Any] = {}
    """Keyword arguments for the function."""

    def train_size(self) -> int:
        """Samples of the training set; the function is called to find out."""
        return len(self.build(None).train)

    def build(self, model: Model | None) -> Task:
        """Model, loss and data."""
        if model is not None:
            raise ConfigError("task.kind=target brings its own model: remove model")
        function = self._function()
        try:
            inspect.signature(function).bind(**self.args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"task.args={self.args!r} do not fit task.target={self.target!r}: {error}") from None
        made = function(**self.args)
        if isinstance(made, tuple) and len(made) in (3, 4):
            made = Task(model=made[0], loss=made[1], train=made[2], test=made[3] if len(made) == 4 else None)
        return _checked(made, self.target)

    def _function(self) -> Callable[..., Any]:
        module, _, name = self.target.partition(":")
        if not module or not name:
            raise ConfigError(f"task.target={self.target!r} must read package.module:function")
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"task.target={self.target!r} does not import: {error}; is it on PYTHONPATH?") from error
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"task.target={self.target!r}: {module} fails where it is imported: {reason}") from error
        function = getattr(found, name, None)
        if not callable(function):
            raise ConfigError(f"task.target={self.target!r}: {module} has no function {name!r}")
        return function


TaskSpec = Annotated[Digits | Cifar10 | Text | Target, Field(discriminator="kind")]


def _checked(task: Any, target: str) -> Task:
    """The task, or a ValueError that says what is wrong with what the user's function returned."""
    from torch import nn

    made, wanted = f"task.target={target!r}", "it must return a distgrow.Task or (model, loss, train[, test])"
    if not isinstance(task, Task):
        raise ConfigError(f"{made} returned {type(task).__name__}; {wanted}")
    if not isinstance(task.model, nn.Module):
        raise ConfigError(f"{made}: model is a {type(task.model).__name__}, not a torch module; {wanted}")
    if not callable(task.loss):
        raise ConfigError(f"{made}: loss is a {type(task.loss).__name__}, not loss(model, batch); {wanted}")
    for name, data in (("train", task.train), ("test", task.test), ("probe", task.probe)):
        if data is not None and not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ConfigError(f"{made}: {name} is no map-style data set (no length or no items); {wanted}")
    if not len(task.train):
        raise ConfigError(f"{made}: the training set is empty")
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        raise ConfigError(f"{made}: model has no parameter that can be trained (requires_grad)")
    return task


def _classification(model: "nn.Module", train: Any, test: Any, probe: Any = None) -> Task:
    """Cross-entropy over the last dimension of the logits, and the share of right answers."""
    import torch.nn.functional as F

    def metrics(model: "nn.Module", batch: Any) -> "dict[str, Tensor]":
        inputs, labels = batch
        logits = model(inputs).flatten(0, -2)
        loss = F.cross_entropy(logits, labels.flatten())
        return {"loss": loss, "accuracy": (logits.argmax(-1) == labels.flatten()).float().mean()}

    def loss(model: "nn.Module", batch: Any) -> "Tensor":
        inputs, labels = batch
        return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())

    return Task(model=model, loss=loss, train=train, test=test, probe=probe, metrics=metrics)
