"""The task of a corpus: next-token prediction on tokens in files, one corpus or a mixture of several."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from distgrow.core.mixing import Weights
from distgrow.core.spec import PosInt, Spec, one_of
from distgrow.distributed.environment import expanded
from distgrow.tasks.architectures import GPT, Model, Tokens
from distgrow.tasks.builtin import built
from distgrow.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

Path = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
Share = Annotated[float, Field(ge=0)]


class Source(Spec):
    """A part of a mixture."""

    path: Path
    """A file, a folder or a pattern, local or a URI."""
    weight: Share | Annotated[dict[Annotated[int, Field(ge=0)], Share], Field(min_length=1)] = 1.0
    """Its share of the windows; or shares from given samples on, {0: 1.0, 100000: 0.5}. They need not sum to 1."""


class Corpus(Spec):
    """Next-token prediction on tokens in Parquet, Arrow or JSONL files, packed into windows."""

    kind: Literal["corpus"] = "corpus"
    path: Path | None = None
    """A file, a folder or a pattern, local or a URI. Give this or `mixture`."""
    mixture: Annotated[list[Source], Field(min_length=1)] | None = None
    """Several corpora, drawn by weight."""
    column: str = "tokens"
    """The column of token numbers, a list in each row."""
    vocabulary: PosInt
    """Tokens that there are; each token is a number below it."""
    length: PosInt = 256
    """Tokens of a window."""
    end: Annotated[int, Field(ge=0)] | None = None
    """A token that is put after each document."""
    across: bool = True
    """Whether a document's last token predicts the next document's first."""
    window: PosInt = 4096
    """Windows that are shuffled together."""
    test: Path | None = None
    """Files of the test set."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Corpus":
        one_of(self, "path", "mixture")
        Weights.of([source.weight for source in self.mixture or [Source(path="-")]])
        return self

    def tokens_per_sample(self) -> int | None:
        """Return the tokens of every sample."""
        return self.length

    def train_size(self) -> int:
        """Count the windows of the training set."""
        return len(self._train())

    def build(self, model: Model | None) -> Task:
        """Build model, loss and data."""
        from torch.nn import functional as F

        from distgrow.tasks.experts import with_balance

        def loss(model: "nn.Module", batch: Any) -> "Tensor":
            logits, labels = model(batch["input_ids"]), batch["labels"]
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

        def metrics(model: "nn.Module", batch: Any) -> dict[str, Any]:
            logits, labels = model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
            counted = labels >= 0
            total = F.cross_entropy(logits, labels, reduction="sum")
            right = ((logits.argmax(-1) == labels) & counted).sum()
            return {"loss": (total, counted.sum()), "accuracy": (right, counted.sum())}

        def items_of_rows(batch: Any) -> "Tensor":
            return (batch["labels"] >= 0).sum(1)

        def items(batch: Any) -> "Tensor":
            return (batch["labels"] >= 0).sum()

        module = built(model or GPT(), Tokens(length=self.length, vocabulary=self.vocabulary))
        test = None if self.test is None else self._packed(self.test)
        some, of_rows = (None, None) if self.across else (items, items_of_rows)
        whole = with_balance(module, loss, of_rows)
        return Task(
            model=module, loss=whole, train=self._train(), test=test, metrics=metrics, items=some, tokens=self.length
        )

    def _train(self) -> Any:
        from distgrow.data.mixture import Mixture

        if self.path is not None:
            return self._packed(self.path)
        return Mixture([(self._packed(source.path), source.weight) for source in self.mixture or []])

    def _packed(self, path: str) -> Any:
        from distgrow.data.packed import Packed
        from distgrow.data.sharded import Files

        settings: dict[str, Any] = {"end": self.end, "across": self.across, "window": self.window}
        files = Files(path, columns=[self.column])
        return Packed(files, self.length, column=self.column, vocabulary=self.vocabulary, **settings)
