"""Masks against a full sort, and what may not move a pruned weight: optimizers, averages, delays, probes, exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import data, loss
from torch import Tensor, nn

from distgrow import (
    CLARS,
    LAMB,
    SGD,
    Adafactor,
    AdamW,
    Muon,
    NAdam,
    RMSprop,
    RunSpec,
    Torch,
    budget,
    constant,
    ema,
    every,
    exponential,
    fit,
    linear_lr,
    load_weights,
    sparsity,
    sqrt_lr,
)  # fmt: skip
from distgrow.checkpoint.export import export
from distgrow.checkpoint.spec import Checkpointing
from distgrow.core.errors import ConfigError, RunError
from distgrow.core.plan import Plan
from distgrow.core.sparsity import Sparsity
from distgrow.distributed.world import World
from distgrow.engine.masks import Masks, count_of, kernels_of, largest
from distgrow.engine.probes import Probe
from distgrow.engine.torch import TorchEngine
from distgrow.optim import OptimizerSpec

SPARSE = sparsity(0.75, every=0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch_of(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([row for row, _ in rows]), torch.tensor([label for _, label in rows])


def plan(density: float, **settings: Any) -> Plan:
    return Plan(batch=16, world=1, micro=16, accum=1, lr=0.1, stage=0, density=density, **settings)


def pruned_engine(optimizer: OptimizerSpec | None = None, spec: Torch | None = None) -> tuple[nn.Module, TorchEngine]:
    model = network()
    engine = TorchEngine(model, loss, optimizer=optimizer, spec=spec)
    engine.prune_by(SPARSE)
    return model, engine


def zeros(model: nn.Module) -> list[Tensor]:
    """Where the kernels are 0."""
    return [parameter.detach() == 0 for parameter in model.parameters() if parameter.dim() >= 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_masks_are_those_of_a_full_sort_with_ties_by_position(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weights = [torch.randn(5, 7).to(dtype), torch.randint(-3, 3, (4, 4, 2)).to(dtype), torch.zeros(3, 2).to(dtype)]
    size, kept = sum(weight.numel() for weight in weights), list[Tensor]()
    flat, before = torch.cat([weight.flatten().double().abs() for weight in weights]), torch.ones(size)
    for density in (0.9, 0.61, 0.6, 0.1, 0.0):
        kept = largest(weights, kept, count_of(density, size))
        order = torch.sort(flat, descending=True, stable=True).indices[: int(density * size + 1e-9)]
        expected = torch.zeros(size).index_fill_(0, order, 1.0)
        found = torch.cat([mask.flatten().float() for mask in kept])
        assert torch.equal(found, expected)
        assert bool((found <= before).all())
        before = found
    assert all(mask.shape == weight.shape for mask, weight in zip(kept, weights, strict=True))


def test_a_pruned_weight_stays_pruned_when_it_grows() -> None:
    weights = [torch.tensor([3.0, 0.1, 2.0, 1.0])]
    kept = largest(weights, [], 2)
    assert kept[0].tolist() == [1, 0, 1, 0]
    assert largest([torch.tensor([1.0, 9.0, 2.0, 9.0])], kept, 1)[0].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("size", [1, 10, 1_000_003])
def test_as_many_weights_are_left_as_the_density_says(size: int) -> None:
    for hundredths in range(101):
        assert count_of(1 - (100 - hundredths) / 100, size) == hundredths * size // 100


class Model(nn.Module):
    """Layers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight
        self.places = nn.Parameter(torch.zeros(3, 4))
        self.mixed, self.norm = nn.MultiheadAttention(4, 2, add_bias_kv=True), nn.LayerNorm([3, 4])
        self.convolution, self.batch_norm = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2)


def test_kernels_are_pruned_but_no_embeddings_norms_biases_ties_or_frozen_ones() -> None:
    model = Model()
    named = dict(model.named_parameters())
    found = kernels_of(model, named, sparsity(0.5))
    assert list(found) == ["mixed.in_proj_weight", "mixed.out_proj.weight", "convolution.weight", "last.weight"]
    kept = kernels_of(model, named, sparsity(0.5, keep_dense=["mixed", "^last"]))
    assert list(kept) == ["convolution.weight"]
    with pytest.raises(ConfigError, match=r"keep_dense='head' meets no kernel; their names are mixed"):
        kernels_of(model, named, sparsity(0.5, keep_dense=["head"]))
    with pytest.raises(ConfigError, match=r"sparsity\.target=0\.5 finds nothing to prune: keep_dense"):
        kernels_of(model, named, sparsity(0.5, keep_dense=["weight"]))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000])
def test_a_target_that_leaves_no_weight_is_refused_and_one_that_leaves_one_is_not(size: int) -> None:
    model = nn.Linear(size, 1)
    named = dict(model.named_parameters())
    kernels_of(model, named, sparsity(1 - 1 / size))
    with pytest.raises(ConfigError, match=rf"leaves none of the {size} weights .* lower it to 1 - 1/{size} or less"):
        kernels_of(model, named, sparsity(1 - 0.99 / size))


OPTIMIZERS: list[OptimizerSpec] = [
    SGD(), SGD(momentum=0.9, nesterov=True, weight_decay=0.1), AdamW(weight_decay=0.1), Muon(), LAMB(), CLARS(),
    NAdam(), RMSprop(), Adafactor(),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda spec: spec.kind)
def test_pruned_weights_stay_zero_and_gradients_are_those_of_the_others(optimizer: OptimizerSpec) -> None:
    model, engine = pruned_engine(optimizer)
    assert engine._masks is not None
    size = sum(mask.numel() for mask in zeros(model))
    before: list[Tensor] | None = None
    for density in (1.0, 1.0, 0.8, 0.8, 0.5, 0.25, 0.25):
        outcome = engine.update(plan(density, window=4), [batch_of(data(16))])
        assert outcome.applied
        found = zeros(model)
        assert sum(int(mask.sum()) for mask in found) == size - count_of(density, size)
        if before is not None:
            assert all(bool((mask >= old).all()) for mask, old in zip(found, before, strict=True))
        before = found
        for name, kernel in engine._masks.kernels.items():
            for key, state in engine.optimizer.state[kernel].items():
                if isinstance(state, Tensor) and state.shape == kernel.shape:
                    masked = state[kernel.detach() == 0]
                    assert not masked.count_nonzero(), f"{name}.{key}"


def test_norms_clipping_and_noise_see_masked_gradients() -> None:
    model, engine = pruned_engine(SGD(clip=0.01))
    engine.update(plan(0.3, window=4), [batch_of(data(16))])
    weights = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    kept = [weight.detach() != 0 if weight.dim() >= 2 else torch.ones_like(weight) for weight in weights]
    halves, names = [data(16)[:8], data(16)[8:]], [name for name, _ in model.named_parameters()]

    def gradient(rows: Any) -> Tensor:
        call = dict(zip(names, weights, strict=True))
        value = nn.functional.cross_entropy(
            torch.func.functional_call(model, call, batch_of(rows)[0]), batch_of(rows)[1]
        )
        found = torch.autograd.grad(value, weights)
        return torch.cat([(g * mask).flatten() for g, mask in zip(found, kept, strict=True)])

    outcome = engine.update(
        Plan(batch=16, world=1, micro=8, accum=2, lr=0.1, stage=0, density=0.3, window=4),
        [batch_of(half) for half in halves],
    )
    parts, whole = [gradient(half) for half in halves], gradient(data(16))
    assert outcome.grad_norm == pytest.approx(float(whole.norm()), rel=1e-12)
    assert outcome.measured.batch_sq == pytest.approx(float(whole @ whole), rel=1e-10)
    assert outcome.measured.parts_sq == pytest.approx(sum(float(g @ g) for g in parts) / 2, rel=1e-10)
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(weights, model.parameters(), strict=True)])
    assert float(moved.norm()) == pytest.approx(0.1 * 0.01, rel=1e-4)  # clipped by that norm


def test_the_first_pruning_comes_before_the_gradient_of_its_update() -> None:
    """Hooks that measure noise are there already when masks come."""
    model, engine = pruned_engine()
    engine.update(plan(1.0, window=4), [batch_of(data(16))])
    outcome = engine.update(plan(0.2, window=4), [batch_of(data(16))])
    assert outcome.measured.parts_sq == pytest.approx(outcome.measured.batch_sq, rel=1e-12)  # one part
    assert outcome.measured.batch_sq == pytest.approx(outcome.grad_norm**2, rel=1e-12)
    assert model is not None


def test_an_exact_probe_measures_the_weights_that_are_left() -> None:
    model, engine = pruned_engine()
    outcome = engine.update(plan(0.3), [batch_of(data(16))])
    assert outcome.applied
    probe = Probe(engine, World(), lambda: [(batch_of(data(16)), 16)])
    _, gradient = probe.gradient()
    pruned = [g[p.detach() == 0] for g, p in zip(gradient, model.parameters(), strict=True) if p.dim() >= 2]
    assert all(not part.count_nonzero() for part in pruned)
    again = engine.update(plan(0.3), [batch_of(data(16))])
    assert float(probe.norm(gradient)) == pytest.approx(again.grad_norm, rel=1e-10)
    random = [torch.randn_like(p) for p in model.parameters()]
    products = probe.product(random)
    inside = [v * (p.detach() != 0) if p.dim() >= 2 else v for v, p in zip(random, model.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(products, probe.product(inside), strict=True))


def test_masks_come_back_from_a_checkpoint_and_not_for_other_kernels() -> None:
    model = network()
    masks = Masks(kernels_of(model, dict(model.named_parameters()), SPARSE), World())
    assert masks.follow(0.4)
    other = Masks(kernels_of(model, dict(model.named_parameters()), SPARSE), World())
    other.load(masks.state())
    assert (other.density, other.follow(0.4), other.follow(0.5)) == (0.4, False, False)
    assert all(torch.equal(a, b) for a, b in zip(masks.named(model).values(), other.named(model).values(), strict=True))
    dense = Sparsity(target=0.5, keep_dense=["^0"])
    with pytest.raises(ValueError, match="other kernels"):
        Masks(kernels_of(model, dict(model.named_parameters()), dense), World()).load(masks.state())


def trained(folder: Path, *, resume: bool = False, **settings: Any) -> tuple[nn.Module, Any]:
    model = network()
    given: dict[str, Any] = {
        "growth": exponential(4, 2, 16), "stages": every(samples=160), "budget": budget(samples=480),
        "lr": sqrt_lr(0.05), "optimizer": AdamW(weight_decay=0.1), **settings,
    }  # fmt: skip
    run = RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=20, keep=9))
    return model, fit(model, loss, data(), run=run, resume=resume, **given)


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"time_s", "samples_per_s"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["event"] == "step"]


def test_a_target_of_zero_is_a_dense_run_bit_for_bit(tmp_path: Path) -> None:
    dense, result = trained(tmp_path / "dense")
    null, other = trained(tmp_path / "null", sparsity=sparsity(0.0))
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), null.parameters(), strict=True))
    assert steps(tmp_path / "dense") == steps(tmp_path / "null")
    assert result.progress == other.progress
    assert not any("compute" in line or "density" in line for line in steps(tmp_path / "null"))


def test_a_run_grows_and_is_pruned_counts_its_compute_and_exports_zeros(tmp_path: Path) -> None:
    model, result = trained(tmp_path, sparsity=SPARSE, average=ema(samples=50))
    lines = steps(tmp_path)
    assert {line["batch"] for line in lines} == {4, 8, 16}
    compute, seen = 0.0, list[float]()
    for line in lines:
        seen.append(line.get("density", 1.0))
        compute += line["batch"] * seen[-1]
        if "compute" in line:
            assert line["compute"] == pytest.approx(compute, rel=1e-12)
    assert seen == sorted(seen, reverse=True)
    assert (seen[0], seen[-1]) == (1.0, 0.25)
    assert result.progress.compute == pytest.approx(480 * SPARSE.average_density, rel=0.02)
    assert sum(int(mask.sum()) for mask in zeros(model)) == 104 - 26
    for average in (False, True):
        export(tmp_path, tmp_path / "model.safetensors", average=average)
        exported = load_file(tmp_path / "model.safetensors")
        loaded = network()
        load_weights(loaded, tmp_path, average=average)
        for (name, parameter), here in zip(model.named_parameters(), loaded.parameters(), strict=True):
            if parameter.dim() >= 2:
                assert exported[name].shape == parameter.shape
                assert torch.equal(exported[name] == 0, parameter.detach() == 0)
                assert torch.equal(here, exported[name])


def test_a_run_is_resumed_with_the_sparsity_that_it_was_begun_with(tmp_path: Path) -> None:
    trained(tmp_path / "dense", budget=budget(samples=200))
    with pytest.raises((ConfigError, RunError), match="sparsity"):
        trained(tmp_path / "dense", budget=budget(samples=200), sparsity=SPARSE, resume=True)
    trained(tmp_path / "sparse", budget=budget(samples=200), sparsity=SPARSE)
    with pytest.raises((ConfigError, RunError), match="sparsity"):
        trained(tmp_path / "sparse", budget=budget(samples=200), resume=True)


def test_a_model_without_kernels_and_what_is_no_sparsity_are_refused(tmp_path: Path) -> None:
    bare = nn.Sequential(nn.Embedding(4, 2), nn.LayerNorm(2))
    common: dict[str, Any] = {"growth": constant(2), "budget": budget(samples=4), "lr": linear_lr(0.1)}
    with pytest.raises(
        ConfigError, match=r"sparsity\.target=0\.8 finds nothing to prune: the model has no trained kern"
    ):
        fit(
            bare, lambda model, batch: model(batch[1]).square().mean(), data(), run=RunSpec(dir=str(tmp_path / "run")),
            sparsity=sparsity(0.8), **common,
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"sparsity=0\.8 .*such as sparsity\(0\.8\)"):
        fit(network(), loss, data(), sparsity=0.8, **common)  # pyright: ignore[reportArgumentType]
