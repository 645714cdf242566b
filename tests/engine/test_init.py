"""A new run begins with the weights of another run or of a file, once; others are refused, or left out by name."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distgrow import ConfigError, RunSpec, budget, constant, constant_lr, ema, fit, init_from, load_weights
from distgrow.checkpoint.export import export
from distgrow.training.init import Init
from distgrow.training.initial_weights import load

ROWS = torch.utils.data.TensorDataset(
    torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4
)


class Tied(nn.Module):
    """A model whose first and last layer share their weight, with statistics of a BatchNorm."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.first, self.norm, self.last = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
        if width == 4:
            self.last.weight = self.first.weight

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.norm(self.first(rows)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(folder: Path, *, epochs: int = 1, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    made = Tied() if model is None else model
    fit(
        made, loss, ROWS, growth=constant(4), lr=constant_lr(0.1), budget=budget(epochs=epochs),
        run=RunSpec(dir=str(folder)), **settings,
    )  # fmt: skip
    return made


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tied model with an average, and its weights in files beside it."""
    folder = tmp_path_factory.mktemp("source")
    model = trained(folder / "run", average=ema(samples=20))
    for name in ("file.safetensors", "file.pt", "folder"):
        export(folder / "run", folder / name)
    once = {name: value for name, value in model.state_dict().items() if name != "last.weight"}
    save_file(once, folder / "once.safetensors")
    torch.save({"epoch": 3}, folder / "other.pt")
    torch.save([1], folder / "list.pt")
    (folder / "broken.pt").write_bytes(b"none")
    (folder / "broken.safetensors").write_bytes(b"none")
    return folder


@pytest.mark.parametrize("name", ["run", "file.safetensors", "file.pt", "folder", "once.safetensors"])
def test_a_run_that_begins_with_weights_is_the_run_of_a_model_that_has_them(
    name: str, source: Path, tmp_path: Path
) -> None:
    wanted, begun = Tied(), tmp_path / "begun"
    load_weights(wanted, source / "run")
    trained(tmp_path / "wanted", model=wanted)
    assert equal(trained(begun, init=source / name), wanted)


def test_a_run_in_object_storage_is_begun_with_by_its_uri(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra 'ray'")
    model, wanted = Tied(), trained(tmp_path / "run", storage=f"file://{tmp_path}/store")
    load(init_from(f"file://{tmp_path}/store/run"), model)
    assert equal(model, wanted)
    with pytest.raises(ConfigError, match="store/none is not a run's folder"):
        load(init_from(f"file://{tmp_path}/store/none"), model)


def test_the_average_and_a_step_of_a_run_are_taken_as_export_takes_them(source: Path) -> None:
    choices: list[dict[str, Any]] = [{"average": True}, {"step": 6}]
    for choice in choices:
        wanted, model = Tied(), Tied()
        load_weights(wanted, source / "run", **choice)
        assert load(init_from(source / "run", **choice), model) == [
            f"begins with 9 of 9 tensors from {source / 'run/checkpoints/step-00000006'}"
        ]
        assert equal(model, wanted)


def test_a_resume_does_not_read_the_weights_again(source: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", init=source / "run", epochs=2)
    shutil.copytree(source / "run", tmp_path / "lost")
    trained(tmp_path / "run", init=tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost")
    assert equal(trained(tmp_path / "run", init=tmp_path / "lost", epochs=2, resume=True), whole)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_with_them_again(source: Path, tmp_path: Path) -> None:
    whole = trained(tmp_path / "run", init=source / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    assert equal(trained(tmp_path / "run", init=source / "run", resume=True), whole)


def test_what_does_not_fit_is_refused_by_name_or_left_out_by_name(source: Path) -> None:
    model = Tied(width=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"of another shape: first.weight is \(4, 4\) there and \(5, 4\)"):
        load(init_from(source / "run"), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.register_buffer("mask", torch.ones(2))
    del model.last.bias
    lines = load(init_from(source / "run", strict=False), model)
    assert lines[0].startswith("begins with 1 of 9 tensors")  # the count of BatchNorm's updates
    assert lines[1].startswith("left out: 7 of another shape: first.weight is (4, 4) there")
    assert lines[2:] == ["left out: 1 not there: mask", "left out: 1 not in the model: last.bias"]


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("nowhere", "does not exist"),
        ("", "is not a run's folder"),
        ("other.pt", "holds no tensors but epoch"),
        ("list.pt", "holds a list"),
        ("broken.pt", "cannot be read"),
        ("broken.safetensors", "cannot be read"),
        ({"from": "file.pt", "best": True}, "best, average and step are of a run"),
        ({"from": "run", "step": 5}, "no checkpoint of that step"),
        ({"from": "run", "best": True}, "has kept no best checkpoint"),
    ],
)
def test_weights_that_cannot_be_had_are_refused_before_there_is_a_folder(
    init: Any, said: str, source: Path, tmp_path: Path
) -> None:
    given = {"from": init} if isinstance(init, str) else init
    spec = Init.model_validate({**given, "from": str(source / given["from"])})
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path / "run", init=spec)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_refused_and_so_is_the_runs_own_folder(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "run", tmp_path / "damaged")
    for file in (tmp_path / "damaged/checkpoints").glob("*/engine.pt"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="no intact checkpoint"):
        trained(tmp_path / "run", init=tmp_path / "damaged")
    with pytest.raises(ConfigError, match="in the run's own folder"):
        trained(tmp_path / "run", init=tmp_path / "run")
    with pytest.raises(ConfigError, match="init=3 .*a run's folder, a file of weights"):
        trained(tmp_path / "run", init=3)
    assert not (tmp_path / "run").exists()
