"""what-if and the report take a run whose optimizer a script has built as they take one whose optimizer has a name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distgrow import LR, SGD, Adagrad, AdamW, budget, constant, fit
from distgrow.core.errors import ConfigError
from distgrow.core.yaml_text import plain, read_text
from distgrow.optim.base import OptimizerSpec
from distgrow.planning.forecast import Recorded, foresee
from distgrow.planning.what_if.outlook import what_if
from distgrow.report.runs import Record, read
from distgrow.training.spec import RunSpec

Make = Callable[[nn.Module], Any]
INPUTS = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
DATA = torch.utils.data.TensorDataset(INPUTS, INPUTS.sum(1, keepdim=True).sign())


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def trained(folder: Path, make: Make, lr: LR | None = None) -> Record:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    run = RunSpec(dir=str(folder))
    fit(model, loss, DATA, growth=constant(4), budget=budget(epochs=2), lr=lr, optimizer=make(model), run=run)
    return read([str(folder)])[0]


OBJECTS: list[tuple[Make, OptimizerSpec]] = [
    (lambda model: torch.optim.SGD(model.parameters(), lr=0.01), SGD()),
    (lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5), SGD(momentum=0.5)),
    (lambda model: torch.optim.SGD([{"params": model.parameters(), "momentum": 0.5}], lr=0.01), SGD(momentum=0.5)),
    (lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0), AdamW(weight_decay=0.0)),
    (lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01, eps=1e-6), Adagrad()),
]


@pytest.mark.parametrize(("make", "spec"), OBJECTS)
def test_an_object_is_predicted_as_the_spec_of_the_same_steps(make: Make, spec: OptimizerSpec, tmp_path: Path) -> None:
    given, named = trained(tmp_path / "given", make), trained(tmp_path / "named", lambda _: spec, LR(base=0.01))
    one, other = what_if(given, ["cosine"]), what_if(named, ["cosine"])
    assert one.loss == pytest.approx(other.loss, rel=1e-3)
    assert one.prospects[0].loss == pytest.approx(other.prospects[0].loss, rel=1e-3)
    assert foresee(given) == foresee(named) is not None


def test_several_objects_can_be_read(tmp_path: Path) -> None:
    def make(model: nn.Module) -> Any:
        weight, bias = model.parameters()
        return [torch.optim.SGD([weight], lr=0.01), torch.optim.AdamW([bias], lr=0.01)]

    folder = trained(tmp_path / "run", make)
    assert not Recorded.model_validate(plain(read_text(folder.config, "config.yaml"))).optimizer.plain_sgd
    assert what_if(folder, ["cosine"]).prospects


def test_objects_that_differ_in_the_rate_alone_follow_one_law_and_others_do_not(tmp_path: Path) -> None:
    one, two, other = (
        trained(tmp_path / f"{lr}-{momentum}", lambda model, o=(lr, momentum): torch.optim.SGD(model.parameters(), *o))
        for lr, momentum in ((0.01, 0.0), (0.02, 0.0), (0.01, 0.5))
    )
    assert what_if(one, ["cosine"], beside=[two]).beside
    with pytest.raises(ConfigError, match="its optimizer is not that of"):
        what_if(one, ["cosine"], beside=[other])
