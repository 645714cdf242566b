"""`task.kind: hf`: causal language models of transformers, from a local config, on the data of `corpus`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from distgrow.config.load import parse
from distgrow.core.errors import ConfigError
from distgrow.tasks.hf import HuggingFace

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")

SIZES = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **SIZES}
BERT = {**LLAMA, "max_position_embeddings": 64}
GPT2 = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, **SIZES}


def config(folder: Path, kind: str, **settings: Any) -> str:
    """A folder with a config.json."""
    made = getattr(transformers, f"{kind}Config")(**settings)
    made.save_pretrained(folder / kind)
    return str(folder / kind)


def task_of(path: str, **settings: Any) -> Any:
    return HuggingFace(config=path, **{"tokenizer": "bytes", "length": 16, "path": __file__, **settings})


def test_the_loss_is_a_mean_over_counted_tokens_under_any_split(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "x" * (3 * k % 11) + str(k)}) + "\n" for k in range(60)))
    base: dict[str, Any] = {
        "task": {"kind": "hf", "config": config(tmp_path, "Llama", **LLAMA), "tokenizer": "bytes", "path": str(rows)},
        "growth": {"kind": "constant", "start": 6}, "budget": {"steps": 3}, "lr": {"base": 0.1},
    }  # fmt: skip
    base["task"] |= {"length": 8, "across": False, "end": 256, "cache": str(tmp_path / "cache")}
    losses = []
    for micro in (6, 4, 1):
        run = {"dir": str(tmp_path / f"run{micro}")}
        parse({**base, "run": run, "engine": {"max_micro": micro, "precision": "float64"}}).fit()
        lines = [json.loads(line) for line in (Path(run["dir"]) / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)


def test_the_loss_is_that_of_transformers_itself(tmp_path: Path) -> None:
    task = task_of(config(tmp_path, "Llama", **LLAMA)).build(None)
    batch = default_collate([task.train[k] for k in range(3)])
    model = task.model.eval()
    ids = torch.cat([batch["input_ids"], batch["labels"][:, -1:]], 1)
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids).loss
        assert float(task.loss(model, batch)) == pytest.approx(float(theirs), rel=1e-5)


def test_weights_beside_the_config_are_loaded_and_a_bare_config_draws_new_ones(tmp_path: Path) -> None:
    path = config(tmp_path, "GPT2", **GPT2)
    torch.manual_seed(3)
    kept = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    kept.save_pretrained(path)
    loaded = task_of(path).build(None).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in kept.state_dict().items())
    drawn = task_of(f"{path}/config.json").build(None).model.state_dict()
    assert not torch.equal(drawn["transformer.wte.weight"], loaded["transformer.wte.weight"])


def test_a_run_is_sampled_and_its_model_comes_out_as_transformers_own(tmp_path: Path) -> None:
    from distgrow.checkpoint.export import export

    task = {"kind": "hf", "config": config(tmp_path, "GPT2", **GPT2), "tokenizer": "bytes", "path": __file__}
    task |= {"length": 16, "test": 0.2, "sample": 5, "cache": str(tmp_path / "cache")}
    values = {"task": task, "growth": {"kind": "exponential", "start": {"tokens": 64}, "cap": {"tokens": 256}}}
    result = parse({**values, "budget": {"tokens": 2048}, "run": {"dir": str(tmp_path / "run")}}).fit()
    assert 0 < result.metrics["bits_per_byte"] == pytest.approx(result.metrics["loss"] / math.log(2))
    assert isinstance(json.loads((tmp_path / "run/samples.jsonl").read_text())["made"], str)
    export(str(tmp_path / "run"), tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_embd == 16


def test_flops_count_what_is_multiplied_and_attention_over_the_whole_length(tmp_path: Path) -> None:
    """Llama's projections, gated MLP, norms and output layer, by hand; its embedding is only looked up."""
    task = task_of(config(tmp_path, "Llama", **LLAMA, tie_word_embeddings=False)).build(None)
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert task.flops_per_token == 6 * (2 * layer + 16 + 260 * 16) + 12 * 2 * 16 * 16
    tied = task_of(config(tmp_path, "GPT2", **GPT2)).build(None)
    block = 2 * 2 * 16 + 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16 * 64 + 64 + 16
    assert tied.flops_per_token == 6 * (block + 2 * 16 + 260 * 16) + 12 * 1 * 16 * 16


def test_configs_of_no_causal_language_model_are_refused(tmp_path: Path) -> None:
    def refused(message: str, path: str, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            task_of(path, **settings).build(None)

    refused("no causal language model", config(tmp_path, "T5", d_model=16, num_layers=1, vocab_size=260))
    refused("sees later tokens", config(tmp_path, "Bert", **BERT))
    task_of(config(tmp_path, "Bert", **BERT, is_decoder=True)).build(None)
    refused("vocab_size=260, but the data has 301 tokens", config(tmp_path, "Llama", **LLAMA), end=300)
    refused("length=64 exceeds the model's max_position_embeddings=32", config(tmp_path, "GPT2", **GPT2), length=64)
    refused("there is no config there", str(tmp_path / "none"))
    (tmp_path / "bad.json").write_text("{")
    refused("no causal language model can be built", str(tmp_path / "bad.json"))
    (tmp_path / "GPT2/pytorch_model.bin").write_bytes(b"")
    refused("no safetensors", str(tmp_path / "GPT2"))
    values: dict[str, Any] = {"task": {"kind": "hf", "config": "x", "tokenizer": "bytes"}, "model": {"kind": "gpt"}}
    with pytest.raises(ConfigError, match="brings its own model"):
        parse({**values, "budget": {"steps": 1}}).fit()
