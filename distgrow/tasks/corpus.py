"""The task of a corpus: next-token prediction by the built-in GPT, on one corpus or a mixture of several."""

from typing import Literal

from distgrow.tasks.architectures import GPT, Model, Tokens, check_model
from distgrow.tasks.builtin import built
from distgrow.tasks.task import Task
from distgrow.tasks.token_data import TokenData


class Corpus(TokenData):
    """Next-token prediction on tokens in Parquet, Arrow or JSONL files, or on texts, packed into windows."""

    kind: Literal["corpus"] = "corpus"

    def check(self, model: Model | None) -> None:
        """Check that the task can be built with a model, as far as no data tells. Raise ConfigError if not."""
        if model is not None:
            check_model(model, Tokens)

    def build(self, model: Model | None) -> Task:
        """Build model, loss and data."""
        from distgrow.tasks.flops import flops_of_gpt
        from distgrow.tasks.language import language_task

        model = model or GPT()
        module = built(model, Tokens(length=self.length, vocabulary=self.tokens_needed()))
        flops = flops_of_gpt(model, module, self.length)
        return language_task(self, module, lambda model, tokens: model(tokens), flops)
