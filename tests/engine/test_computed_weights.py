"""Layers that compute their weights from other parameters are named under pruning, or left dense on request."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from distgrow.core.errors import ConfigError
from distgrow.core.plan import Plan
from distgrow.core.sparsity import Sparsity
from distgrow.engine.masks import kernels_of
from distgrow.engine.torch import TorchEngine


class Symmetric(nn.Module):
    """A weight that is its own transpose."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).T


def registered(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


MADE: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "weight_norm of old": (nn.utils.weight_norm, {"0.weight_g", "0.weight_v"}),
    "spectral_norm of old": (nn.utils.spectral_norm, {"0.weight_orig"}),
    "weight_norm": (
        parametrizations.weight_norm,
        {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    ),
    "spectral_norm": (parametrizations.spectral_norm, {"0.parametrizations.weight.original"}),
    "parametrize": (registered, {"0.parametrizations.weight.original"}),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.2), {"0.weight_orig"}),
}


@pytest.mark.parametrize("name", MADE)
def test_parameters_of_computed_weights_are_named_and_left_dense_on_request(name: str) -> None:
    make, parameters = MADE[name]
    model = nn.Sequential(make(nn.Linear(4, 4)), nn.Linear(4, 2))
    named = dict(model.named_parameters())
    assert parameters <= named.keys()
    with pytest.raises(ConfigError, match=r"sparsity cannot prune .*sparsity.keep_dense") as refused:
        kernels_of(model, named, Sparsity(target=0.5))
    assert all(parameter in str(refused.value) for parameter in parameters)
    for kept in (r"^0\.", "weight_|original"):
        assert set(kernels_of(model, named, Sparsity(target=0.5, keep_dense=[kept]))) == {"1.weight"}
    if name.startswith("weight_norm"):  # one of the two alone is not enough
        with pytest.raises(ConfigError, match="sparsity cannot prune"):
            kernels_of(model, named, Sparsity(target=0.5, keep_dense=["weight_g|original0"]))


def test_computed_embeddings_stay_dense_as_others_do_and_plain_layers_are_pruned_as_before() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Embedding(5, 4)), nn.Linear(4, 2))
    assert set(kernels_of(model, dict(model.named_parameters()), Sparsity(target=0.5))) == {"1.weight"}
    plain = nn.utils.remove_weight_norm(nn.utils.weight_norm(nn.Linear(4, 4)))
    assert set(kernels_of(plain, dict(plain.named_parameters()), Sparsity(target=0.5))) == {"weight"}


def test_a_layer_that_is_left_dense_trains_on_and_the_other_is_pruned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    before = copy.deepcopy(dict(model.named_parameters()))
    engine = TorchEngine(model, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    engine.prune_by(Sparsity(target=0.5, keep_dense=["weight_"]))
    plan = Plan(batch=4, world=1, micro=4, accum=1, lr=0.1, stage=0, density=0.5)
    engine.update(plan, [(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))])
    named = dict(model.named_parameters())
    assert int((named["1.weight"] == 0).sum()) == 4
    for name in ("0.weight_g", "0.weight_v"):
        assert (named[name] != 0).all()
        assert not torch.equal(named[name], before[name])
