"""The model out: exported weights against the live module's, the average's, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from distgrow import KeepBest, RunSpec, budget, constant, constant_lr, ema, fit, load_weights
from distgrow.checkpoint.export import export
from distgrow.checkpoint.spec import Checkpointing
from distgrow.cli import app
from distgrow.core.errors import ConfigError
from distgrow.engine.torch import TorchEngine
from distgrow.training.spec import Evaluation


class Tied(nn.Module):
    """A model whose first and last layer share their weight, with statistics of a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.norm(self.first(rows)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(folder: Path, average: Any = None) -> nn.Module:
    numbers, model = torch.Generator().manual_seed(1), Tied()
    rows = [(torch.randn(4, generator=numbers), k % 4) for k in range(32)]
    fit(
        model, loss, rows, growth=constant(8), lr=constant_lr(0.3), budget=budget(samples=64), average=average,
        run=RunSpec(dir=str(folder), checkpoint=Checkpointing(every_steps=2, keep=20)),
    )  # fmt: skip
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("export") / "run"
    return folder, trained(folder, ema(samples=20))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("target", "file"), [("m.safetensors", ""), ("m.pt", ""), ("out", "model.safetensors")])
def test_exported_weights_are_the_live_modules(run: Any, target: str, file: str, tmp_path: Path) -> None:
    folder, model = run
    answer = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / target)])
    assert answer.exit_code == 0, answer.output
    written = tmp_path / target / file
    state = torch.load(written, weights_only=True) if target.endswith("pt") else load_file(written)
    assert same(state, model.state_dict())
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_the_average_is_what_the_engine_evaluates_tied_names_and_statistics_included(run: Any, tmp_path: Path) -> None:
    folder, model = run
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    other = Tied()
    engine = TorchEngine(other, loss)
    engine.load(newest)
    exported = load_file(export(folder, tmp_path / "a.safetensors", average=True)[0])
    with engine.at_average() as there:
        assert there
        assert same(exported, other.state_dict())
    assert not torch.equal(exported["last.weight"], model.state_dict()["last.weight"])
    loaded = Tied()
    load_weights(loaded, folder, average=True)
    assert same(loaded.state_dict(), exported)
    assert loaded.first.weight is loaded.last.weight


def test_a_step_is_the_run_that_ended_there(run: Any) -> None:
    model, newest = Tied(), Tied()
    load_weights(model, run[0], step=2)
    load_weights(newest, run[0], step=8)
    assert same(newest.state_dict(), run[1].state_dict())
    assert model.norm.num_batches_tracked == 2
    assert newest.norm.num_batches_tracked == 8


def another() -> nn.Module:
    model = Tied()
    model.more = nn.Linear(2, 2)
    return model


def wider() -> nn.Module:
    model = Tied()
    model.last = nn.Linear(4, 5)
    return model


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (Tied, {"step": 3}, r"step=3.* of that step; there are those of 0, 2, 4, 6, 8"),
        (Tied, {"step": True}, "step=True"),
        (Tied, {"step": 2, "best": True}, "best and step=2"),
        (Tied, {"best": True}, "kept no best"),
        (another, {}, "the run lacks more.weight, more.bias"),
        (lambda: Tied().first, {}, "the run lacks weight, bias; the model lacks first.weight"),
        (wider, {"strict": False}, r"last.weight has shape \(4, 4\) there, \(5, 4\) in the model"),
    ],
)
def test_what_is_not_there_is_refused(run: Any, make: Callable[[], nn.Module], options: Any, said: str) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        load_weights(model, run[0], **options)
    assert same(before, dict(model.state_dict()))


def test_strict_false_loads_the_names_that_both_have(run: Any) -> None:
    model = another()
    load_weights(model, run[0], strict=False)
    assert torch.equal(model.state_dict()["first.weight"], run[1].state_dict()["first.weight"])


def test_a_damaged_checkpoint_is_passed_over_or_refused_with_the_intact_one(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-00000008/engine.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"step-00000008 is damaged: engine.pt .*newest intact one is step=6"):
        export(tmp_path / "run", tmp_path / "a.pt", step=8)
    _, weights = export(tmp_path / "run", tmp_path / "a.pt")
    assert weights.checkpoint.name == "step-00000006"
    assert weights.damaged == ("step-00000008: engine.pt does not match its digest",)
    with pytest.raises(ConfigError, match="holds no average"):
        export(tmp_path / "run", tmp_path / "b.pt", average=True)
    with pytest.raises(ConfigError, match=r"NAME.safetensors, NAME.pt or a folder"):
        export(tmp_path / "run", tmp_path / "b.onnx")
    with pytest.raises(ConfigError, match="is not a run's folder"):
        export(tmp_path / "nothing", tmp_path / "b.pt")
    with pytest.raises(ConfigError, match=r"cannot write .*a.pt/b/model.safetensors: Not a directory"):
        export(tmp_path / "run", tmp_path / "a.pt/b")
    assert not (tmp_path / "b.pt").exists()


def test_the_best_is_the_checkpoint_of_the_best_evaluation_and_not_the_newest(tmp_path: Path) -> None:
    numbers, evaluations, live = torch.Generator().manual_seed(1), list[float](), list[dict[str, Tensor]]()
    rows = [(torch.randn(4, generator=numbers), k % 4) for k in range(32)]

    def metrics(model: nn.Module, _: Any) -> dict[str, float]:
        evaluations.append(abs(len(evaluations) - 1.0))  # the second is the best
        live.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"score": evaluations[-1]}

    fit(
        Tied(), loss, rows, test=rows[:8], metrics=metrics, growth=constant(8), lr=constant_lr(0.3),
        budget=budget(samples=96), hooks=[KeepBest("score")],
        run=RunSpec(dir=str(tmp_path / "run"), eval=Evaluation(every_steps=3), checkpoint=Checkpointing(keep=1)),
    )  # fmt: skip
    best = evaluations.index(0.0)
    assert best < len(live) - 1
    loaded = Tied()
    load_weights(loaded, tmp_path / "run", best=True)
    assert same(dict(loaded.state_dict()), live[best])
    assert not same(live[best], live[-1])
