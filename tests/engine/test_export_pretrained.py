"""Hugging Face models out: what a folder holds against what the live model saves, from folders and object storage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from distgrow import RunSpec, budget, constant, constant_lr, fit, load_weights
from distgrow.checkpoint.export import export, weights_of
from distgrow.cli import app
from distgrow.core.errors import ConfigError

WORDS = {"<pad>": 0, "<eos>": 1, "grow": 2, "the": 3, "batch": 4}


class Own(transformers.GPT2LMHeadModel):
    """A class that transformers does not have."""


def loss(model: Any, batch: Any) -> Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def trained(folder: Path, kind: Any = transformers.GPT2LMHeadModel, **settings: Any) -> Any:
    """Train a tiny model whose first and last layer are tied, and return it with its tokenizer."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 5,
        "n_positions": 8,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 1,
    }
    model = kind(transformers.GPT2Config(**shape, eos_token_id=1, pad_token_id=0))
    model.generation_config.max_new_tokens = 7
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rows = [{"input_ids": [2, 3, 4, k % 5]} for k in range(16)]
    fit(
        model, loss, rows, growth=constant(8), lr=constant_lr(0.5), budget=budget(steps=2),
        collate=transformers.DataCollatorWithPadding(tokenizer, return_tensors="pt"), run=RunSpec(dir=str(folder)),
        **settings,
    )  # fmt: skip
    return model, tokenizer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_a_folder_is_what_the_live_model_and_its_tokenizer_save(tmp_path: Path) -> None:
    model, tokenizer = trained(tmp_path / "run")
    answer = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert answer.exit_code == 0, answer.output
    model.save_pretrained(tmp_path / "live")
    tokenizer.save_pretrained(tmp_path / "live")
    files = {path.name: path.read_bytes() for path in (tmp_path / "live").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("grow the batch").input_ids == [2, 3, 4]


def test_a_class_of_ones_own_is_loaded_and_not_guessed(tmp_path: Path) -> None:
    model, _ = trained(tmp_path / "run", Own)
    with pytest.raises(ConfigError, match=r"model is \w+\.Own, which .* does not have: load the weights by"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = Own(model.config)
    load_weights(other, tmp_path / "run")
    assert same(other.state_dict(), model.state_dict())


def test_a_config_of_other_shapes_or_none_writes_nothing(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    config = tmp_path / "run/pretrained/config.json"
    text = config.read_text()
    for damaged in (text.replace('"n_embd": 8', '"n_embd": 10'), text[:-5]):
        assert damaged != text
        config.write_text(damaged)
        with pytest.raises(ConfigError, match=r"pretrained: the model cannot be built .* write NAME.safetensors"):
            export(tmp_path / "run", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_run_in_object_storage_is_exported_by_its_uri_or_by_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra 'ray'")
    uri = f"file://{tmp_path}/store"
    model, _ = trained(tmp_path / "run", storage=uri, about={"launch": {"storage_path": uri}})
    assert not list((tmp_path / "run/checkpoints").iterdir())
    for k, run in enumerate((f"{uri}/run", tmp_path / "run")):
        export(run, tmp_path / f"out{k}")
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"out{k}")
        assert same(loaded.state_dict(), model.state_dict())
        assert same(dict(weights_of(run).state), model.state_dict())
    newest = max((tmp_path / "store/run/checkpoints").iterdir())
    (newest / "engine.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="engine.pt does not match its digest"):
        export(f"{uri}/run", tmp_path / "no.pt", step=2)
    with pytest.raises(ConfigError, match="store/other is not a run's folder; give run.dir .* or its URI"):
        export(f"{uri}/other", tmp_path / "no.pt")
    with pytest.raises(ConfigError, match="RUN=nowhere://there: .* URI that pyarrow.fs knows"):
        export("nowhere://there", tmp_path / "no.pt")
    with pytest.raises(ConfigError, match="written to this machine's files"):
        export(tmp_path / "run", f"{uri}/no.pt")
    assert not list(tmp_path.glob("*.pt"))
