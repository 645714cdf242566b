"""Hugging Face models: their config and tokenizer beside a run, and folders that from_pretrained reads.

Only `write` imports transformers.
"""

import contextlib
import copy
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgrow.core.errors import ConfigError, RunError
from distgrow.run.folder import RunFolder, storing

_CONFIG = "config.json"


def keep(folder: RunFolder, model: object, *holders: object) -> None:
    """Keep the config of a Hugging Face model in the run's folder, and the tokenizer if there is one.

    Do nothing if the model is another one, or if the folder has them already.

    Args:
        folder: The run's folder.
        model: The model that is trained.
        *holders: What may have the tokenizer as `tokenizer`, such as collate. The first one is taken.
    """
    if not _pretrained(model) or (folder.pretrained / _CONFIG).is_file():
        return
    partial = folder.path / ".partial-pretrained"
    with storing(folder.path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _save(model, next(_tokenizers(holders), None), partial)
            shutil.rmtree(folder.pretrained, ignore_errors=True)
            partial.rename(folder.pretrained)
        except Exception as error:  # a tokenizer is the user's code; a full disk is told as elsewhere
            if isinstance(error, OSError) and error.errno is not None:
                raise
            warnings.warn(f"export FOLDER will lack config and tokenizer, which cannot be saved: {error}", stacklevel=2)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def kept(folder: RunFolder) -> bool:
    """Return whether a run's folder has the config of a Hugging Face model."""
    return (folder.pretrained / _CONFIG).is_file()


def write(state: Mapping[str, Tensor], source: Path, target: Path) -> None:
    """Let a Hugging Face model save itself with these weights, its config and its tokenizer.

    Executes no code but that of the installed transformers.

    Args:
        state: The model's state.
        source: What `keep` has kept.
        target: An empty folder.

    Raises:
        ConfigError: transformers is not installed, or knows no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "a folder with a Hugging Face model needs transformers: pip install 'distgrow[transformers]', or write "
            f"NAME.safetensors ({error})"
        ) from None
    with _told(source):
        name = str(json.loads((source / _CONFIG).read_text(encoding="utf-8"))["architectures"][0])
        kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(
            f"the run's model is {name}, which the installed transformers does not have: load "
            "the weights by distgrow.load_weights(model, RUN) and call model.save_pretrained(FOLDER), or write "
            "NAME.safetensors"
        )
    with _told(source), _quiet(transformers):
        model = _model(kind, state, source)
        for file in source.iterdir():
            shutil.copyfile(file, target / file.name)
        model.save_pretrained(target)


def _model(kind: Any, state: Mapping[str, Tensor], source: Path) -> Any:
    """Return the model with these weights."""
    from transformers import GenerationConfig

    config = kind.config_class.from_pretrained(source, local_files_only=True)
    config._attn_implementation = "eager"  # others may be fetched from elsewhere; it is not saved
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source, local_files_only=True)
    return model


@contextlib.contextmanager
def _told(source: Path) -> Iterator[None]:
    """Turn failures of transformers into one that names the folder and a remedy.

    Raises:
        RunError: Something failed inside the context.
    """
    try:
        yield
    except Exception as error:  # a model's own code runs here
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RunError(
            f"{source}: the model cannot be built from its config and the weights ({type(error).__name__}: {reason}); "
            "write NAME.safetensors, or load the weights by distgrow.load_weights(model, RUN) and call "
            "model.save_pretrained(FOLDER)"
        ) from None


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Show no progress bars of transformers inside the context."""
    logs = transformers.utils.logging
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logs.enable_progress_bar()


def _pretrained(model: object) -> bool:
    """Return whether a model is a PreTrainedModel of transformers, without importing it."""
    classes = type(model).__mro__
    return any(kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.") for kind in classes)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save config and tokenizer. The architecture is the model's class, with its module if it is the user's own."""
    kind, config = type(model), copy.deepcopy(model.config)
    known = kind.__module__.startswith("transformers.")
    config.architectures = [kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}"]
    config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _tokenizers(holders: tuple[object, ...]) -> Iterator[Any]:
    """Yield the tokenizers that objects have, or that functools.partial gives to functions."""
    for holder in holders:
        words = getattr(holder, "keywords", None)
        own = words.get("tokenizer") if isinstance(words, dict) else None
        for tokenizer in (getattr(holder, "tokenizer", None), own):
            if callable(getattr(tokenizer, "save_pretrained", None)):
                yield tokenizer
