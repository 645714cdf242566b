"""Which modules engine.kind=fsdp makes units, its hosts, its files, and Muon's steps on rows of a matrix."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.fsdp import FSDPModule

from distgrow.checkpoint.safetensors_file import write
from distgrow.core.errors import ConfigError, RunError
from distgrow.distributed.world import World
from distgrow.engine.fsdp import HEAD, files
from distgrow.engine.fsdp.files import metadata
from distgrow.engine.fsdp.mesh import hosts
from distgrow.engine.fsdp.meta import Maker
from distgrow.engine.fsdp.shards import has_room
from distgrow.engine.fsdp.spec import FSDP
from distgrow.engine.fsdp.weights import Weights
from distgrow.engine.fsdp.wrap import Undo, checkpoint_in_place, units_of
from distgrow.optim.joined import Muon
from distgrow.optim.trust_ratio import LAMB


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def names(model: nn.Module, wrap: str | list[str]) -> list[str]:
    return [name for name, _ in units_of(model, wrap)]


def test_auto_finds_the_block_that_a_model_repeats_and_none_where_only_layers_repeat() -> None:
    assert names(Net(), "auto") == BLOCKS
    assert names(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), "auto") == []


def test_units_are_the_modules_of_the_named_classes() -> None:
    assert names(Net(), ["Block"]) == BLOCKS
    assert names(Net(), ["Block", "Sequential"]) == [n for k in BLOCKS for n in (k, f"{k}.layers")]


@pytest.mark.parametrize(
    ("wrap", "told"),
    [(["Blok"], r"class Blok; it has Linear \(8\), Block \(3\)"), (["ModuleList"], "blocks is a ModuleList")],
)
def test_what_can_be_no_unit_is_refused_by_name(wrap: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        units_of(Net(), wrap)


def test_a_parameter_that_is_tied_across_units_is_refused_by_name() -> None:
    model = Net()
    model.blocks[2].layers[0].weight = model.blocks[0].layers[0].weight  # pyright: ignore
    with pytest.raises(ConfigError, match=r"blocks\.0\.layers\.0\.weight is a parameter of blocks\.2"):
        units_of(model, "auto")


def test_hosts_must_have_equally_many_ranks_side_by_side() -> None:
    assert hosts(["a", "a", "b", "b", "c", "c"]) == 3
    for wrong in (["a", "a"], ["a", "b", "a", "b"], ["a", "a", "b"]):
        with pytest.raises(ConfigError, match=r"engine\.replicas"):
            hosts(wrong)


def test_what_is_done_to_modules_is_taken_back() -> None:
    model, rows = Net(), torch.randn(2, 3)
    before, undo = model(rows), Undo(model)
    kept = [set(vars(part)) for part in model.modules()]
    for block in model.blocks:
        checkpoint_in_place(block)
        block.register_forward_hook(lambda *_: torch.zeros(2, 4))
    assert not torch.equal(model(rows), before)
    undo()
    assert torch.equal(model(rows), before)
    assert [set(vars(part)) for part in model.modules()] == kept


def test_a_model_without_numbers_begins_part_by_part_as_at_once() -> None:
    with torch.device("meta"):
        whole, parts = Net(), Net()
    Maker(whole, torch.device("cpu"), 3).make(whole)
    maker = Maker(parts, torch.device("cpu"), 3)
    for part in (*reversed(parts.blocks), parts):
        maker.make(part)
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))
    first, second = whole.blocks[0].layers[0].weight, whole.blocks[1].layers[0].weight  # pyright: ignore
    assert not torch.equal(first, second)
    assert first.abs().max() <= 0.5 < 1.1 * first.abs().max() + 0.1  # uniform up to 1/sqrt(4)


def test_a_parameter_that_nothing_begins_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = Net()
        model.blocks[1].scale = nn.Parameter(torch.ones(4))
    with pytest.raises(ConfigError, match=r"blocks\.1\.scale of Block"):
        Maker(model, torch.device("cpu"), 3).make(model)


def test_safetensors_written_one_by_one_are_read_by_the_library(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    state = {
        "odd": torch.tensor([True, False, True]), "shared": shared, "turned": shared.T,
        "half": torch.randn(5).bfloat16(), "empty": torch.zeros(0, 3), "one": torch.tensor(7),
        "wide": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    write(state, tmp_path / "file.safetensors")
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def peak_kb() -> int:
    """The largest memory of this process since the last call of `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def store(written: dict[str, bytes], folder: Path) -> None:
    for name, data in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def test_an_export_takes_the_memory_of_its_largest_tensors_and_not_of_the_model(tmp_path: Path) -> None:
    size, count = 2**19, 32  # 2 MiB each
    store(files.write({f"model.{k}": torch.full((size,), float(k)) for k in range(count)}), tmp_path)
    torch.save({"rest": {"model.kept": torch.ones(3)}, "tied": {}, "average": {}, "averaged": False}, tmp_path / HEAD)
    weights = Weights(tmp_path)
    write({"warm": weights["0"]}, tmp_path / "warm")
    forget_peak()
    before = peak_kb()
    write(weights, tmp_path / "file", weights.kind)
    assert peak_kb() - before < count * 2048 / 3
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[str(k)], torch.full((size,), float(k))) for k in range(count))
    assert torch.equal(found["kept"], torch.ones(3))


def test_records_of_a_checkpoint_build_nothing_but_dcps_own(tmp_path: Path) -> None:
    for number, wrong in enumerate((print, {"no": "metadata"}, Path)):
        file = tmp_path / str(number)
        file.write_bytes(pickle.dumps(wrong))
        with pytest.raises(RunError, match="without executing code"):
            metadata(file)


class Halves:
    """Two ranks in one process: each has half of the rows, and the other's are computed beside."""

    def __init__(self, others: dict[int, Tensor]) -> None:
        self.others = others  # by the parameter's id: what the other rank has of the value that is asked for

    def whole(self, parameter: Tensor, value: Tensor) -> Tensor:
        return torch.cat([value, self.others[id(parameter)]])

    def own(self, parameter: Tensor, whole: Tensor) -> Tensor:
        return whole[: len(parameter)]

    def norms(self, own: Tensor) -> Tensor:
        return own * 2**0.5  # the other half is the same


def test_muon_steps_rows_of_a_matrix_as_the_whole_one() -> None:
    torch.manual_seed(0)
    settings = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
    start, gradients = torch.randn(6, 5), torch.randn(3, 6, 5)
    whole, rows = nn.Parameter(start.clone()), nn.Parameter(start[:3].clone())
    one, other = torch.optim.Muon([whole], **settings), Muon([rows], **settings)  # pyright: ignore[reportArgumentType]
    other.joined = halves = Halves({})
    kept = torch.zeros(3, 5)
    for gradient in gradients:
        whole.grad, rows.grad = gradient.clone(), gradient[:3].clone()
        halves.others[id(rows)] = kept.lerp_(gradient[3:], 0.1)
        one.step()
        other.step()
        torch.testing.assert_close(rows.detach(), whole.detach()[:3], rtol=1e-6, atol=1e-6)


def test_lamb_steps_rows_of_a_parameter_by_the_norms_of_the_whole() -> None:
    half, settings = torch.randn(3, 5), {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    whole, rows = nn.Parameter(half.repeat(2, 1)), nn.Parameter(half.clone())
    one, other = LAMB([{"params": [whole]}], **settings), LAMB([{"params": [rows]}], **settings)
    other.joined = Halves({})
    for gradient in torch.randn(3, 3, 5):
        whole.grad, rows.grad = gradient.repeat(2, 1), gradient.clone()
        one.step()
        other.step()
        torch.testing.assert_close(rows.detach(), whole.detach()[:3], rtol=1e-6, atol=1e-6)


def test_a_whole_model_goes_back_to_a_gpu_that_has_room_for_it_and_a_tenth_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    parts = [torch.zeros(100), torch.zeros(125)]  # 900 bytes
    assert has_room(torch.device("cuda", 0), parts)
    assert not has_room(torch.device("cuda", 0), [*parts, torch.zeros(1)])
    assert has_room(torch.device("cpu"), [*parts, torch.zeros(1000)])


class Taken:
    """Pickled as `owner.name`, as Python up to 3.11.3 pickles the members of enumerations."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def test_a_torch_that_cannot_give_up_a_trial_is_refused_before_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "reset_iter_state")
    world = World(rank=0, size=1, device=torch.device("cpu"))
    FSDP(wrap=["Linear"]).check_cut(nn.Sequential(nn.Linear(2, 2)), world)
    with pytest.raises(ConfigError, match=r"engine.max_micro=auto.*give max_micro a number"):
        FSDP(wrap=["Linear"], max_micro="auto").check_cut(nn.Sequential(nn.Linear(2, 2)), world)


def test_metadata_of_older_pythons_is_read_and_what_else_they_could_take_is_not(tmp_path: Path) -> None:
    formats = _MEM_FORMAT_ENCODING
    for owner, name, allowed in (
        (formats, "TORCH_CHANNELS_LAST", True), (formats, "__class__", False), (Metadata, "__init__", False),
    ):  # fmt: skip
        record = Metadata(state_dict_metadata={}, planner_data=Taken(owner, name), storage_data={})
        (tmp_path / ".metadata").write_bytes(pickle.dumps(record))
        if allowed:
            assert metadata(tmp_path / ".metadata").planner_data is formats.TORCH_CHANNELS_LAST
        else:
            with pytest.raises(RunError, match=rf"without executing code: it takes {name} of"):
                metadata(tmp_path / ".metadata")
