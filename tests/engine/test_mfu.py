"""FLOPs of a token, peaks of GPUs, and the share of the peak in metrics, console and report."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distgrow.config.load import parse
from distgrow.core.errors import ConfigError
from distgrow.core.peak_flops import peak_flops
from distgrow.distributed.world import World
from distgrow.engine.asynchronous.spec import Async
from distgrow.engine.spec import Torch
from distgrow.report.runs import read
from distgrow.report.sections import sentence
from distgrow.tasks.architectures import GPT
from distgrow.tasks.builtin import Text
from distgrow.tasks.corpus import Corpus
from distgrow.tasks.task import Task
from distgrow.tracking.terminal import Terminal
from distgrow.training.utilisation import mfu_of_token

BYTES: dict[str, Any] = {"tokenizer": "bytes"}
WIDTH, LAYERS, LENGTH, VOCABULARY = 24, 3, 16, 256


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_flops_of_the_gpt_are_counted_by_hand(tied: bool, positions: Any) -> None:
    """Whether tied or not, tokens cost the output layer once; looking up tokens and places costs nothing."""
    model = GPT(width=WIDTH, layers=LAYERS, heads=2, tied=tied, positions=positions)
    task = Corpus(tokenizer="bytes", path=__file__, length=LENGTH).build(model)
    block = 12 * WIDTH**2 + (3 + 1 + 4 + 1) * WIDTH + 2 * 2 * WIDTH
    parameters = LAYERS * block + 2 * WIDTH + VOCABULARY * WIDTH
    assert task.flops_per_token == 6 * parameters + 12 * LAYERS * WIDTH * LENGTH


def test_the_task_of_a_text_counts_the_same_flops() -> None:
    model = GPT(width=WIDTH, layers=LAYERS, heads=2)
    tasks = [kind(path=__file__, length=LENGTH, **more).build(model) for kind, more in ((Text, {}), (Corpus, BYTES))]
    assert tasks[0].flops_per_token == tasks[1].flops_per_token is not None


def test_flops_of_experts_are_not_claimed() -> None:
    model = GPT(width=WIDTH, heads=2, experts=4, active=1)
    assert Corpus(tokenizer="bytes", path=__file__, length=LENGTH).build(model).flops_per_token is None


@pytest.mark.parametrize(
    ("gpu", "precision", "tf32", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", False, 312.0),
        ("NVIDIA A100-SXM4-80GB", "float32", False, 19.5),
        ("NVIDIA A100-SXM4-80GB", "float32", True, 156.0),
        ("NVIDIA H100 80GB HBM3", "bfloat16", False, 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", False, 756.5),
        ("NVIDIA H100 NVL", "bfloat16", False, 835.5),
        ("NVIDIA H200", "float16", False, 989.4),
        ("NVIDIA L40S", "bfloat16", False, 362.0),
        ("NVIDIA L40", "bfloat16", False, 181.0),
        ("NVIDIA L4", "bfloat16", False, 121.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", False, None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", False, 165.2),
        ("NVIDIA H100 80GB HBM3", "float64", False, None),
        ("AMD Instinct MI300X", "bfloat16", False, None),
    ],
)
def test_peaks_are_those_of_the_name(gpu: str, precision: str, tf32: bool, tera: float | None) -> None:
    assert peak_flops(gpu, precision, tf32=tf32) == (None if tera is None else pytest.approx(tera * 1e12))


def test_the_share_is_of_the_peak_of_all_ranks() -> None:
    task = Task(model=torch.nn.Linear(1, 1), loss=lambda *_: torch.zeros(()), train=[], flops_per_token=3e6)
    assert mfu_of_token(task, Torch(), 2e12, World(size=4)) == 3e6 / 8e12
    assert mfu_of_token(task, Torch(), None, World(size=4)) is None
    assert mfu_of_token(task, Async(workers=2), 2e12, World()) is None


def test_lines_console_and_report_show_it_where_the_peak_is_given(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "task": {"kind": "corpus", "tokenizer": "bytes", "path": __file__, "length": LENGTH},
        "model": {"kind": "gpt", "width": WIDTH, "layers": LAYERS, "heads": 2},
        "growth": {"kind": "constant", "start": 8}, "budget": {"steps": 4},
        "run": {"dir": str(tmp_path / "run"), "peak_flops": 1e9},
    }  # fmt: skip
    flops = parse(values).task.build(parse(values).model).flops_per_token
    result = parse(values).fit()
    lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert len(steps) == 4
    for line in steps:
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * flops / 1e9)
        assert line["tokens_per_s"] == pytest.approx(line["samples_per_s"] * LENGTH)
    shown = io.StringIO()
    Terminal(32, stream=shown).log({**steps[0], "mfu": 0.371})
    assert "tokens/s · MFU 37.1%" in shown.getvalue()
    assert "at an MFU of " in sentence(read([str(result.dir)])[0])
    del values["run"]["peak_flops"]
    values["run"]["dir"] = str(tmp_path / "without")
    without = (parse(values).fit().dir / "metrics.jsonl").read_text()
    assert torch.cuda.is_available() or "mfu" not in without


@pytest.mark.parametrize("peak", [0, -1e12])
def test_a_peak_that_is_none_is_refused(peak: float) -> None:
    with pytest.raises(ConfigError, match=r"run\.peak_flops"):
        parse({"budget": {"steps": 1}, "run": {"peak_flops": peak}})
