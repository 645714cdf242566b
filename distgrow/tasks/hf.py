"""The task of a Hugging Face model: next-token prediction by any causal language model of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as Place
from typing import TYPE_CHECKING, Any, Literal

from distgrow.core.errors import ConfigError
from distgrow.tasks.architectures import Model
from distgrow.tasks.task import Task
from distgrow.tasks.token_data import Path, TokenData

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Tokens of the rows by which is tried whether a model looks ahead.
_TRIED = 8


class HuggingFace(TokenData):
    """Next-token prediction by a causal language model of Hugging Face, on the data of the task `corpus`.

    Nothing is fetched, and no code but that of the installed transformers is executed.
    """

    kind: Literal["hf"] = "hf"
    config: Path
    """A config.json, for random weights; or a folder with one, whose *.safetensors are loaded if it has such."""

    def check(self, model: Model | None) -> None:
        """Check that the task can be built with a model, as far as no data tells. Raise ConfigError if not."""
        if model is not None:
            raise ConfigError("task.kind=hf brings its own model: remove model")

    def build(self, model: Model | None) -> Task:
        """Build model, loss and data."""
        from distgrow.tasks.flops import flops_per_token
        from distgrow.tasks.language import language_task

        self.check(model)
        place, needed = Place(self.config), self.tokens_needed()
        with _told(f"task.config={self.config}"):
            module = _model(place)
            _check_size(module.config, needed, self)
            _check_causal(module, place, min(self.length, _TRIED))
        config = module.config.get_text_config()
        layers, width, flops = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0), None
        if layers and width and not _sparse(config):
            flops = flops_per_token(module, layers=layers, width=width, length=self.length)
        return language_task(self, module, _logits, flops)


def _logits(model: "nn.Module", tokens: "Tensor") -> "Tensor":
    return model(input_ids=tokens, use_cache=False).logits


def _model(place: Place) -> Any:
    """Return the model of a config, with the weights beside it if there are any. Raise ConfigError if there is none."""
    transformers = _package(place)
    if not place.exists() or (place.is_dir() and not (place / "config.json").is_file()):
        raise ConfigError(
            f"task.config={place}: there is no config there; give the path of a config.json or of a folder that has "
            "one, such as model.save_pretrained(FOLDER) writes; nothing is fetched"
        )
    weights = place.is_dir() and any(place.glob("*.safetensors"))
    if place.is_dir() and not weights and (pickles := [*place.glob("*.bin"), *place.glob("*.pt")]):
        raise ConfigError(
            f"task.config={place}: its weights, {pickles[0].name}, are no safetensors, and reading them could execute "
            f"code; save them as such, or give {place / 'config.json'} to begin from random weights"
        )
    config = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"task.config={place}: model_type={config.model_type} is no causal language model; give the config of one, "
            "such as gpt2, llama or qwen2"
        )
    if weights:
        settings: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        return transformers.AutoModelForCausalLM.from_pretrained(place, **settings).float()
    return transformers.AutoModelForCausalLM.from_config(config).float()


def _check_size(config: Any, needed: int, data: TokenData) -> None:
    """Check that a model has as many tokens and places as the data. Raise ConfigError if it has fewer."""
    text = config.get_text_config()
    if text.vocab_size < needed:
        raise ConfigError(
            f"task.config has vocab_size={text.vocab_size}, but the data has {needed} tokens (task.tokenizer="
            f"{data.tokenizer}, task.vocabulary={data.vocabulary}, task.end={data.end}): allowed are models with at "
            "least as many; raise vocab_size, or use the model's own tokenizer"
        )
    places = getattr(text, "max_position_embeddings", None)
    if places is not None and places < data.length:
        raise ConfigError(
            f"task.length={data.length} exceeds the model's max_position_embeddings={places}; lower it, or use another "
            "config"
        )


def _check_causal(model: Any, place: Place, length: int) -> None:
    """Check that a model's logits do not depend on later tokens. Raise ConfigError if they do."""
    import torch

    training = model.training
    with torch.no_grad():
        model.eval()
        tokens = torch.zeros(2, length, dtype=torch.long)
        tokens[1, -1] = 1
        one, other = _logits(model, tokens)[:, :-1]
    model.train(training)
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
        raise ConfigError(
            f"task.config={place}: model_type={model.config.model_type} sees later tokens, and so what it is to "
            "predict; set is_decoder=true in the config if the model has that, or give a causal language model"
        )


def _sparse(config: Any) -> bool:
    """Return whether a token uses some of the parameters alone, so that they say nothing about FLOPs."""
    return any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def _package(place: Place) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"task.config={place} needs the extra 'transformers': pip install 'distgrow[transformers]' ({error})"
        ) from None
    return transformers


@contextmanager
def _told(key: str) -> Iterator[None]:
    """Turn what transformers raises about a config into a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a model's own code runs here
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{key}: no causal language model can be built from it ({type(error).__name__}: {reason}); give a "
            "config.json that the installed transformers knows"
        ) from None
