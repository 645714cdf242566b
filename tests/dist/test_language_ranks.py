"""A GPT on texts on two ranks, by DDP, ZeRO 3 and fsdp: the run of one process, and the text that it writes."""

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from conftest import Commands, events, torchrun

CONFIG = """
task: {kind: corpus, tokenizer: bytes, path: PATH, length: 16, test: 0.1, sample: 12, cache: cache}
model: {kind: gpt, layers: 2, width: 16, heads: 2, positions: rotary, mlp: swiglu, checkpoint_blocks: second}
growth: {kind: exponential, start: 8, cap: 32}
stages: {every: {samples: 64}}
budget: {samples: 192}
lr: {base: 0.01}
optimizer: {kind: adamw}
run: {eval: {every_samples: 96, rows: 64}}
"""
WATCH = """
import torch

def logits(model):
    return [round(value, 3) for value in model(torch.arange(16).unsqueeze(0))[0, -1, :4].tolist()]
"""
HOOK = 'run.hooks=[{target: "distgrow:LogSamples", args: {sample: "watch:logits"}}]'


def trained(distgrow: Commands, name: str, *words: str, workers: int) -> tuple[list[float], list[Any]]:
    """The losses of updates and evaluations of a run, and all that its model has made."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "keyword.py"
    (distgrow.folder / "gpt.yaml").write_text(CONFIG.replace("PATH", str(path)))
    (distgrow.folder / "watch.py").write_text(WATCH)
    assert distgrow("train", "gpt.yaml", f"run.dir={name}", HOOK, *words, module=torchrun(workers)).code == 0
    run = distgrow.folder / name
    made = [json.loads(line)["made"] for line in (run / "samples.jsonl").read_text().splitlines()]
    return [line["loss"] for kind in ("step", "eval") for line in events(run, kind)], made


DEEPSPEED = pytest.param("{kind: deepspeed, zero: 3}", marks=pytest.mark.slow)


@pytest.mark.parametrize("engine", ["{kind: torch}", DEEPSPEED, "{kind: fsdp}"])
def test_two_ranks_train_the_model_of_one_process_and_write_its_text(engine: str, distgrow: Commands) -> None:
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    losses, made = trained(distgrow, "one", workers=1)
    of_two, made_by_two = trained(distgrow, "two", f"engine={engine}", workers=2)
    assert of_two == pytest.approx(losses, rel=1e-4)
    assert len(made) == 3
    assert made_by_two[-1] == made[-1]
    for logits, wanted in zip(made_by_two[:-1], made[:-1], strict=True):
        assert logits == pytest.approx(wanted, abs=2e-3)
