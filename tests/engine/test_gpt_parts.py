"""Options of the built-in GPT: rotary positions, SwiGLU, untied embeddings, and blocks that are computed again."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from distgrow import load_weights
from distgrow.checkpoint.export import export
from distgrow.config.load import parse
from distgrow.core.errors import ConfigError, RunError
from distgrow.engine.spec import Torch
from distgrow.tasks import models
from distgrow.tasks.architectures import GPT, Tokens

INPUTS = Tokens(length=8, vocabulary=11)
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2}


def built(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return GPT(**{**SMALL, **settings}).build(INPUTS)


def test_scores_of_turned_queries_and_keys_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, dtype=torch.float64)
    places = models.turned(q.expand(9, 6)) @ models.turned(k.expand(9, 6)).T
    for distance in range(-8, 9):
        diagonal = places.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    angles = [place * 10_000 ** (-2 * pair / 6) for place in (5,) for pair in range(3)]
    turned = torch.view_as_complex(torch.stack([q[:3], q[3:]], -1)) * torch.tensor(
        [complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128
    )
    assert torch.allclose(models.turned(q.expand(9, 6))[5], torch.cat([turned.real, turned.imag]), rtol=1e-12)


def test_a_rotary_model_has_no_table_of_places_and_tells_places_apart_and_never_looks_ahead() -> None:
    model = built(positions="rotary").eval()
    assert not any("places" in name for name, _ in model.named_parameters())
    tokens = torch.tensor([[3, 4, 5, 6, 7, 1, 2, 0]])
    swapped = tokens[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert not torch.allclose(model(tokens)[:, 4], model(swapped)[:, 4], atol=1e-6)
    changed = tokens.clone()
    changed[0, 5] = 9
    assert torch.equal(model(tokens)[:, :5], model(changed)[:, :5])


def test_swiglu_is_the_formula_and_has_the_weights_of_gelu() -> None:
    torch.manual_seed(0)
    layer, x = models.SwiGLU(12).double(), torch.randn(3, 12, dtype=torch.float64)
    gate, up, down = (layer.get_parameter(f"{name}.weight") for name in ("gate", "up", "down"))
    g, u = x @ gate.T, x @ up.T
    assert torch.allclose(layer(x), (g / (1 + (-g).exp()) * u) @ down.T)
    weights = [
        sum(p.numel() for p in make(96).parameters() if p.dim() == 2) for make in (models.SwiGLU, models.feed_forward)
    ]
    assert weights[0] == weights[1] == 8 * 96**2


def test_swiglu_is_an_expert_too() -> None:
    model = built(mlp="swiglu", experts=4, active=2)
    assert sum(isinstance(part, models.SwiGLU) for part in model.modules()) == 2 * 4


def test_tied_embeddings_are_one_tensor_and_untied_ones_are_two() -> None:
    tied, untied = built(), built(tied=False)
    assert tied.get_parameter("head.weight") is tied.get_parameter("tokens.weight")
    assert untied.get_parameter("head.weight") is not untied.get_parameter("tokens.weight")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert sizes[1] - sizes[0] == 11 * 16


@pytest.mark.parametrize("blocks", ["all", "second"])
def test_blocks_that_are_computed_again_give_the_same_gradients_under_dropout(blocks: str) -> None:
    found: list[list[Tensor]] = []
    for each in ("none", blocks):
        model = built(checkpoint_blocks=each, dropout=0.3, layers=3).double().train()
        torch.manual_seed(7)
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("blocks", "forwards"), [("none", 4), ("second", 6), ("all", 8)])
def test_so_many_blocks_are_computed_again(blocks: str, forwards: int) -> None:
    model, calls = built(checkpoint_blocks=blocks, layers=4).train(), list[int]()
    for block in model.get_submodule("blocks"):  # pyright: ignore[reportGeneralTypeIssues]
        block.get_submodule("qkv").register_forward_hook(lambda *_: calls.append(1))
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    assert len(calls) == forwards


class Block(nn.Module):
    """A block of the GPT as it was before it had options."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.feed = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.feed(self.norm2(x))


class Before(nn.Module):
    """The GPT as it was before it had options."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 16), nn.Embedding(8, 16)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 * (0.5 if name.endswith(("out.weight", ".2.weight")) else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


def test_the_defaults_give_the_model_that_there_was_before_options_bit_by_bit() -> None:
    torch.manual_seed(0)
    before, now = Before(), built()
    assert {name: value.tolist() for name, value in before.state_dict().items()} == {
        name: value.tolist() for name, value in now.state_dict().items()
    }
    tokens = torch.randint(11, (3, 8))
    assert torch.equal(before(tokens), now(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "rotary", "width": 6, "heads": 2}, "model.positions=rotary.*model.width=6.*3 for each"),
        ({"checkpoint_blocks": "all", "experts": 4, "active": 1}, "checkpoint_blocks=all"),
        ({"mlp": "relu"}, "gelu"),
    ],
)
def test_options_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(**settings)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_bfloat16_by_muon_trains_resumes_and_exports(tied: bool, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "task": {"kind": "text", "length": 16, "path": __file__},
        "model": {"kind": "gpt", **SMALL, "positions": "rotary", "mlp": "swiglu", "tied": tied},
        "growth": {"kind": "exponential", "start": 8, "cap": 32}, "stages": {"every": {"samples": 64}},
        "lr": {"base": 0.01}, "optimizer": {"kind": "muon"}, "engine": {"kind": "torch", "precision": "bfloat16"},
        "budget": {"samples": 256}, "run": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    config["model"]["checkpoint_blocks"] = "second"
    result = parse(config).fit()
    assert result.metrics["loss"] < math.log(256)
    export(str(tmp_path / "run"), tmp_path / "model.safetensors")
    task = parse(config).task.build(parse(config).model)
    load_weights(task.model, tmp_path / "run")
    assert (task.model.get_parameter("head.weight") is task.model.get_parameter("tokens.weight")) is tied
    batch = torch.utils.data.default_collate([task.test[k] for k in range(len(task.test))])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert float(task.loss(task.model.eval(), batch)) == pytest.approx(result.metrics["loss"], rel=0.02)
    assert isinstance(parse(config).engine, Torch)


def test_a_run_whose_config_was_written_before_there_were_options_resumes(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "task": {"kind": "text", "length": 16, "path": __file__}, "model": {"kind": "gpt", **SMALL},
        "growth": {"kind": "constant", "start": 8}, "budget": {"steps": 2}, "run": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    progress = parse(config).fit().progress
    recorded = tmp_path / "run/config.yaml"
    values = yaml.safe_load(recorded.read_text())
    for name in ("positions", "mlp", "tied", "checkpoint_blocks"):
        del values["model"][name]
    del values["run"]["peak_flops"]
    recorded.write_text(yaml.safe_dump(values))
    assert parse(config).fit(resume=True).progress == progress
    config["model"]["mlp"] = "swiglu"
    with pytest.raises(RunError, match=r"model\.mlp: 'gelu' in the folder, 'swiglu' now"):
        parse(config).fit(resume=True)


def test_blocks_that_would_be_computed_again_twice_are_refused() -> None:
    values = {"task": {"kind": "text"}, "model": {"kind": "gpt", "checkpoint_blocks": "all"}, "budget": {"steps": 1}}
    parse({**values, "engine": {"kind": "fsdp"}})
    with pytest.raises(ConfigError, match=r"model\.checkpoint_blocks=all and engine\.checkpoint_blocks=second"):
        parse({**values, "engine": {"kind": "fsdp", "checkpoint_blocks": "second"}})


@pytest.mark.slow
def test_a_compiled_model_with_all_options_makes_the_updates_of_the_plain_one(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        config: dict[str, Any] = {
            "task": {"kind": "text", "length": 16, "path": __file__},
            "model": {"kind": "gpt", **SMALL, "positions": "rotary", "mlp": "swiglu", "checkpoint_blocks": "second"},
            "growth": {"kind": "constant", "start": 8}, "optimizer": {"kind": "muon"}, "lr": {"base": 0.01},
            "engine": {"kind": "torch", "compile": compiled}, "budget": {"steps": 3},
            "run": {"dir": str(tmp_path / str(compiled)), "eval": {"every_epochs": 1000}},
        }  # fmt: skip
        lines = (parse(config).fit().dir / "metrics.jsonl").read_text().splitlines()
        losses.append([event["loss"] for event in map(json.loads, lines) if event["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
