"""TokenData: the data of language models, tokens or texts in files, packed into windows; knows no model."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from distgrow.core.errors import ConfigError
from distgrow.core.mixing import Weights
from distgrow.core.spec import PosInt, Spec, one_of
from distgrow.distributed.environment import expanded

if TYPE_CHECKING:
    from distgrow.data.tokenizer import Tokenizer

Path = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
Share = Annotated[float, Field(ge=0)]


class Source(Spec):
    """A part of a mixture."""

    path: Path
    """A file, a folder or a pattern, local or a URI."""
    weight: Share | Annotated[dict[Annotated[int, Field(ge=0)], Share], Field(min_length=1)] = 1.0
    """Its share of the windows; or shares from given samples on, {0: 1.0, 100000: 0.5}. They need not sum to 1."""


class TokenData(Spec):
    """Tokens in Parquet, Arrow or JSONL files, or texts that a tokenizer makes tokens of, packed into windows."""

    path: Path | None = None
    """A file, a folder or a pattern, local or a URI. Give this or `mixture`. Default with a tokenizer: the sources of
    Python's standard library."""
    mixture: Annotated[list[Source], Field(min_length=1)] | None = None
    """Several corpora, drawn by weight."""
    tokenizer: Path | None = None
    """What makes tokens of texts: bytes, or the path of a tokenizer.json of Hugging Face. Text files are then allowed,
    too. Default: the files hold tokens."""
    column: str = "tokens"
    """The column of token numbers, a list in each row; with a tokenizer, of texts. Default with a tokenizer: text."""
    vocabulary: PosInt | None = None
    """Tokens that there are; each token is a number below it. Default with a tokenizer: as many as it has."""
    length: PosInt = 256
    """Tokens of a window."""
    end: Annotated[int, Field(ge=0)] | None = None
    """A token that is put after each document. With tokenizer=bytes, 256 is the first one that is no byte."""
    across: bool = True
    """Whether a document's last token predicts the next document's first."""
    window: PosInt = 4096
    """Windows that are shuffled together. Those of texts are all shuffled together."""
    test: Path | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Files of the test set; with a tokenizer also a share of the texts, their end, that is held out."""
    cache: Path | None = None
    """A folder on each host for the tokens of texts. Default: a folder of yours in the temporary folder."""
    sample: PosInt | None = None
    """Tokens of a text that the model writes at the end of the run, into RUN/samples.jsonl; with a tokenizer."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """What that text goes on from. Default: the end of a line."""

    @model_validator(mode="before")
    @classmethod
    def _column_of_texts(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tokenizer") is not None:
            return {"column": "text", **values}
        return values

    @model_validator(mode="after")
    def _parts_fit(self) -> "TokenData":
        if self.tokenizer is None or self.path is not None or self.mixture is not None:
            one_of(self, "path", "mixture")
        Weights.of([source.weight for source in self.mixture or [Source(path="-")]])
        if self.tokenizer is None:
            self._check_without_tokenizer()
        elif isinstance(self.test, float) and self.mixture is not None:
            raise ConfigError(
                f"test={self.test:g} is a share of one corpus, not of a mixture: give the path of test files"
            )
        return self

    def _check_without_tokenizer(self) -> None:
        if self.vocabulary is None:
            raise ConfigError(
                "vocabulary is not given: say how many tokens there are, or give tokenizer=bytes for texts"
            )
        if isinstance(self.test, float):
            raise ConfigError(
                f"test={self.test:g} is a share of texts, and there is no tokenizer: give the path of files"
            )
        if self.sample is not None:
            raise ConfigError(
                f"sample={self.sample} tokens cannot be shown as a text without a tokenizer: give tokenizer=PATH, or "
                "leave it out"
            )

    def tokens_per_sample(self) -> int | None:
        """Return the tokens of every sample."""
        return self.length

    def train_size(self) -> int:
        """Count the windows of the training set."""
        return len(self.training())

    def tokenizes(self) -> "Tokenizer | None":
        """Return the tokenizer; None if the files hold tokens."""
        from distgrow.data.tokenizer import tokenizer_of

        return None if self.tokenizer is None else tokenizer_of(self.tokenizer, "task.tokenizer")

    def tokens_needed(self) -> int:
        """Return the tokens that there are.

        Raises:
            ConfigError: There are more than `vocabulary`.
        """
        tokenizer = self.tokenizes()
        if tokenizer is None:
            assert self.vocabulary is not None
            return self.vocabulary
        least = max(tokenizer.size, 0 if self.end is None else self.end + 1)
        if self.vocabulary is not None and self.vocabulary < least:
            raise ConfigError(
                f"task.vocabulary={self.vocabulary} is too small for task.tokenizer={self.tokenizer} with "
                f"task.end={self.end}: allowed are numbers from {least}; raise it, or leave it out"
            )
        return self.vocabulary or least

    def training(self) -> Any:
        """Return the windows of the training set."""
        from distgrow.data.mixture import Mixture

        if self.mixture is None:
            stop = 1 - self.test if isinstance(self.test, float) else 1.0
            return self._packed(self.path, (0.0, stop))[0]
        return Mixture([(self._packed(source.path)[0], source.weight) for source in self.mixture])

    def testing(self) -> tuple[Any, float]:
        """Return the windows of the test set, None if there is none; and the tokens of a byte of its text, or 0."""
        if self.test is None:
            return None, 0.0
        if isinstance(self.test, str):
            return self._packed(self.test)
        return self._packed(self.path, (1 - self.test, 1.0))

    def _packed(self, path: str | None, part: tuple[float, float] = (0.0, 1.0)) -> tuple[Any, float]:
        """Return windows, and the tokens of a byte of their texts; 0: there are no texts."""
        from distgrow.data.packed import Packed
        from distgrow.data.sharded import Files
        from distgrow.data.texts import texts_of
        from distgrow.data.tokenized import Tokenized

        tokenizer, settings = self.tokenizes(), {"end": self.end, "across": self.across, "window": self.window}
        if tokenizer is None:
            assert path is not None
            files = Files(path, columns=[self.column])
            return Packed(files, self.length, column=self.column, vocabulary=self.vocabulary, **settings), 0.0
        documents = Tokenized(texts_of(path, self.column), tokenizer, part=part, folder=self.cache)
        tokens = documents.tokens + (len(documents) if self.end is not None else 0)
        windows = Packed(documents, self.length, vocabulary=self.tokens_needed(), lengths=documents.lengths, **settings)
        return windows, tokens / max(1, documents.bytes)
