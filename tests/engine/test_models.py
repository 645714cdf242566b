"""Models have their published sizes, look where they may, and refuse inputs that they do not fit."""

from typing import Any

import pytest
import torch

from distgrow.core.errors import ConfigError
from distgrow.tasks.architectures import GPT, MLP, Images, ResNet, Softmax, Tokens


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (Softmax(), 64 * 10 + 10),
        (MLP(hidden=[32]), 64 * 32 + 32 + 32 * 10 + 10),
        (ResNet(kind="resnet8", norm="batch"), 78_042),
        (ResNet(kind="resnet20", norm="batch"), 272_474),
        (ResNet(kind="resnet18", norm="batch"), 11_173_962),
    ],
)
def test_models_have_the_published_number_of_parameters(spec: Any, parameters: int) -> None:
    channels = 3 if isinstance(spec, ResNet) else 1
    side = 32 if isinstance(spec, ResNet) else 8
    model = spec.build(Images(channels=channels, height=side, width=side, classes=10))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if spec.kind != "resnet18":
        assert model(torch.randn(2, channels, side, side)).shape == (2, 10)


def test_the_gpt_never_looks_ahead() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, width=16, heads=2).build(Tokens(length=8, vocabulary=11))
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    one, other = model(tokens), model(changed)
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.equal(one[:, 5:], other[:, 5:])


def test_models_that_do_not_fit_the_inputs_are_refused() -> None:
    images, tokens = Images(channels=1, height=8, width=8, classes=10), Tokens(length=8, vocabulary=11)
    with pytest.raises(ConfigError, match=r"model\.kind=gpt needs task\.kind=text"):
        GPT().build(images)
    with pytest.raises(ConfigError, match=r"model\.kind=mlp needs images"):
        MLP().build(tokens)
    with pytest.raises(ConfigError, match="does not divide"):
        GPT(width=10, heads=4).build(tokens)
