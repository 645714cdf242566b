"""The task of symbolic puzzles after Raven's matrices: compositions of rules that were not trained on."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from distgrow.core.errors import ConfigError
from distgrow.core.spec import PosInt, Spec
from distgrow.tasks.architectures import GPT, Model, Tokens, check_model
from distgrow.tasks.builtin import built
from distgrow.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn


class Raven(Spec):
    """Symbolic grids of 3 × 3 panels whose last panel is predicted; the test set's rules are known, but not together.

    Each feature of a panel is a value from 0 to 7 and follows one of 8 rules along every row of the grid: constant,
    progression by +1, +2, −1 or −2, sum, difference, three values in any order. `model.kind=gpt` takes it.
    """

    kind: Literal["raven"] = "raven"
    rows: PosInt = 100_000
    """Puzzles of the training set. They are made as they are drawn, so that millions take no memory."""
    test: PosInt = 2_000
    """Puzzles of the test set, all of held-out multisets."""
    features: Annotated[int, Field(ge=1, le=6)] = 4
    """Features of a panel, each with a rule of its own: how complex the task is."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the multisets of rules that the test set has and the training set lacks; with 4 features 82 of 330."""
    shuffled: bool = True
    """Whether features change places from column to column, in all rows alike."""
    seed: int = 0
    """Of the puzzles, and of which multisets are held out."""

    def tokens_per_sample(self) -> int | None:
        """Return None: puzzles are no text."""
        return None

    def train_size(self) -> int:
        """Count the puzzles of the training set."""
        return self.rows

    def check(self, model: Model | None) -> None:
        """Check that the task can be built with a model, as far as no data tells. Raise ConfigError if not."""
        if model is not None:
            check_model(model, Tokens)
        self._multisets()

    def build(self, model: Model | None) -> Task:
        """Build model, loss and data."""
        from torch.nn import functional as F

        from distgrow.data.raven import VALUES
        from distgrow.tasks.experts import with_balance

        def answers(model: "nn.Module", tokens: "Tensor") -> "Tensor":
            return model(tokens)[:, -self.features :, :VALUES]

        def loss(model: "nn.Module", batch: Any) -> "Tensor":
            return F.cross_entropy(answers(model, batch[0]).flatten(0, 1), batch[1].flatten())

        def metrics(model: "nn.Module", batch: Any) -> "dict[str, Tensor]":
            logits, wanted = answers(model, batch[0]), batch[1]
            right = logits.argmax(-1) == wanted
            each = {"accuracy": right.all(1).float().mean(), "feature_accuracy": right.float().mean()}
            return {"loss": F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), **each}

        module = built(model or GPT(), Tokens(length=9 * self.features, vocabulary=VALUES + 1, causal=False))
        train, test = self._puzzles()
        return Task(model=module, loss=with_balance(module, loss), train=train, test=test, metrics=metrics)

    def _puzzles(self) -> tuple[Any, Any]:
        from distgrow.core.order import mix_int
        from distgrow.data.raven import Puzzles

        known, new = self._multisets()
        return (
            Puzzles(self.rows, known, mix_int(self.seed, 1), shuffled=self.shuffled),
            Puzzles(self.test, new, mix_int(self.seed, 2), shuffled=self.shuffled),
        )

    def _multisets(self) -> tuple[Any, Any]:
        """Return the multisets of rules of training and test set. Raise ConfigError if the latter has none."""
        from distgrow.data.raven import multisets

        known, new = multisets(self.features, self.held_out, self.seed)
        if not len(new):
            raise ConfigError(f"task.held_out={self.held_out:g} of {len(known)} multisets is less than one; raise it")
        return known, new
