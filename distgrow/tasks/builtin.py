"""The built-in tasks: digits, CIFAR-10, text."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from distgrow.core.errors import ConfigError
from distgrow.core.spec import PosInt, Spec
from distgrow.data import files
from distgrow.distributed.environment import expanded
from distgrow.tasks.architectures import GPT, MLP, Images, Inputs, Model, ResNet, Tokens, check_model
from distgrow.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn


# ── tasks ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Digits(Spec):
    """scikit-learn's handwritten digits, embedded: 1,437 to train on, 360 to test on."""

    kind: Literal["digits"] = "digits"

    def tokens_per_sample(self) -> int | None:
        """Return None: samples are no tokens."""
        return None

    def train_size(self) -> int:
        """Count the samples of the training set without loading it."""
        return 1437

    def check(self, model: Model | None) -> None:
        """Check that the task can be built with a model, as far as no data tells. Raise ConfigError if not."""
        if model is not None:
            check_model(model, Images)

    def build(self, model: Model | None) -> Task:
        """Build model, loss and data."""
        from distgrow.data import datasets

        train, test = datasets.digits()
        return _classification(built(model or MLP(), Images(channels=1, height=8, width=8, classes=10)), train, test)


class Cifar10(Spec):
    """CIFAR-10 from a folder of Parquet files in the Hugging Face layout; cropped and flipped at random."""

    kind: Literal["cifar10"] = "cifar10"
    path: Annotated[str, AfterValidator(expanded)] = "data/cifar10"
    """Folder with …train….parquet and …test….parquet."""
    subset: PosInt | None = None
    """Use only this many training images, the first ones."""
    augment: bool = True
    """Random shifts by up to 4 pixels and mirroring."""

    def tokens_per_sample(self) -> int | None:
        """Return None: samples are no tokens."""
        return None

    def train_size(self) -> int:
        """Count the samples of the training set without loading it."""
        rows = files.parquet_rows(files.parquet_files(Path(self.path), "train"))
        return rows if self.subset is None else min(rows, self.subset)

    def check(self, model: Model | None) -> None:
        """Check that the task can be built with a model, as far as no data tells. Raise ConfigError if not."""
        if model is not None:
            check_model(model, Images)

    def build(self, model: Model | None) -> Task:
        """Build model, loss and data."""
        from distgrow.data import datasets

        parts = [files.parquet_files(Path(self.path), part) for part in ("train", "test")]
        train = datasets.Images(*files.parquet_images(parts[0], limit=self.subset), augment=self.augment)
        test = datasets.Images(*files.parquet_images(parts[1], limit=None), augment=False)
        images = Images(channels=3, height=train.height, width=train.width, classes=10)
        return _classification(built(model or ResNet(), images), train, test, probe=train.plain())


class Text(Spec):
    """Next-token prediction on a text; by default on the sources of Python's standard library."""

    kind: Literal["text"] = "text"
    path: Annotated[str, Field(min_length=1), AfterValidator(expanded)] | None = None
    """A text file or a folder."""
    pattern: str = "*"
    """Which files of a folder to read."""
    level: Literal["byte", "character"] = "byte"
    """What a token is."""
    length: PosInt = 64
    """Tokens of one sample."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the text, its end, that is held out."""

    def tokens_per_sample(self) -> int | None:
        """Return the tokens of every sample."""
        return self.length

    def train_size(self) -> int:
        """Count the samples of the training set."""
        return (len(self._split()[0]) - 1) // self.length

    def check(self, model: Model | None) -> None:
        """Check that the task can be built with a model, as far as no data tells. Raise ConfigError if not."""
        if model is not None:
            check_model(model, Tokens)

    def build(self, model: Model | None) -> Task:
        """Build model, loss and data."""
        from distgrow.data import datasets
        from distgrow.tasks.flops import flops_of_gpt

        model, (train, test, vocabulary) = model or GPT(), self._split()
        module = built(model, Tokens(length=self.length, vocabulary=vocabulary))
        parts = (datasets.Tokens(part, self.length) for part in (train, test))
        task = _classification(module, *parts, tokens=self.length)
        return replace(task, flops_per_token=flops_of_gpt(model, module, self.length))

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


def _classification(model: "nn.Module", train: Any, test: Any, probe: Any = None, tokens: int | None = None) -> Task:
    """Build a task with cross-entropy over the last dimension of the logits, and accuracy as its metric."""
    import torch.nn.functional as F

    from distgrow.tasks.experts import with_balance

    def metrics(model: "nn.Module", batch: Any) -> "dict[str, Tensor]":
        inputs, labels = batch
        logits = model(inputs).flatten(0, -2)
        loss = F.cross_entropy(logits, labels.flatten())
        return {"loss": loss, "accuracy": (logits.argmax(-1) == labels.flatten()).float().mean()}

    def loss(model: "nn.Module", batch: Any) -> "Tensor":
        inputs, labels = batch
        return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())

    return Task(
        model=model, loss=with_balance(model, loss), train=train, test=test, probe=probe, metrics=metrics, tokens=tokens
    )


def built(model: Model, inputs: Inputs) -> "nn.Module":
    """Build a model. Raise ConfigError if no memory holds it."""
    try:
        return model.build(inputs)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:  # the last for sizes beyond 64 bits
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        settings = ", ".join(f"{key}={value}" for key, value in model.model_dump().items())
        raise ConfigError(f"model: {settings} cannot be held in memory ({reason}); give it less width") from None
