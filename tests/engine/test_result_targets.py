"""Where results are to be written is checked before anything is measured, and the message names the option at fault."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from distgrow.config.load import parse
from distgrow.config.run import Run
from distgrow.core.errors import ConfigError
from distgrow.critical_batch.branches import ProbeOptions
from distgrow.critical_batch.probe import probe_batch
from distgrow.critical_batch.proposal import Wish
from distgrow.critical_batch.range_test import range_test
from distgrow.run.targets import check_new_file, write_new_file


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return parse(
        {
            "model": {"kind": "softmax"},
            "growth": {"kind": "constant", "start": 8},
            "lr": {"base": 0.1},
            "budget": {"samples": 64},
            "run": {"dir": "runs/one"},
        }
    )


def in_no_folder(name: str) -> str:
    return f"missing/{name}"


def below_a_file(name: str) -> str:
    Path("file").write_text("precious")
    return f"file/{name}"


def with_a_long_name(name: str) -> str:
    return name + 300 * "x"


def on_a_loop(name: str) -> str:
    Path("loop").symlink_to("loop")
    return f"loop/{name}"


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(tried: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    """The message; nothing has been measured or written by then."""
    before = contents()
    with pytest.raises(ConfigError) as error:
        tried()
    assert "training loss" not in "".join(capsys.readouterr())
    assert contents() == before
    return str(error.value)


NOWHERE = (below_a_file, with_a_long_name, on_a_loop)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("--save", in_no_folder),  # such an --out is made
        *((option, wrong) for option in ("--save", "--out", "--out of probe-batch") for wrong in NOWHERE),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_by_its_option_before_anything_is_measured(
    wrong: Callable[[str], str], option: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wrong("own.yaml")
    tried: dict[str, Callable[[], None]] = {
        "--save": lambda: range_test(run, 20, None, Wish(workers=2), path),
        "--out": lambda: range_test(run, 20, path),
        "--out of probe-batch": lambda: probe_batch("runs/one", ProbeOptions(out=path)),
    }
    if option == "--out of probe-batch":
        run.fit()
        capsys.readouterr()
    told = refused(tried[option], capsys)
    assert told.startswith(f"cannot write to {option.split()[0]}={path}: ")
    assert "; choose a" in told
    for unsuitable in ("run.dir", "Checkpoints", "--resume"):
        assert unsuitable not in told


def own_config() -> str:
    Path("own.yaml").write_text("growth: {start: 8}\n")
    return "own.yaml"


def a_folder() -> str:
    Path("here").mkdir()
    return "here"


def a_dead_link() -> str:
    Path("link").symlink_to("nowhere")
    return "link"


@pytest.mark.parametrize("there", [own_config, a_folder, a_dead_link])
def test_what_is_there_is_never_replaced(
    there: Callable[[], str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    save = there()
    told = refused(lambda: range_test(run, 20, None, Wish(workers=2), save), capsys)
    assert re.fullmatch(rf"--save={save} exists already .*: choose another file, or move this one away", told)
    assert os.path.lexists(save)


@pytest.mark.parametrize("end", ["json", "png"])
def test_the_proposal_does_not_go_where_the_results_do(end: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    save = f"results/range-test-one.{end}"
    assert f"--save={save}" in refused(lambda: range_test(run, 20, "results", Wish(workers=2), save), capsys)


def test_a_file_that_came_while_runs_were_measured_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    check_new_file(file, "--save")
    assert not file.exists()
    write_new_file(file, "first", "--save")
    with pytest.raises(ConfigError, match=f"--save={file} exists already"):
        write_new_file(file, "second", "--save")
    assert file.read_text() == "first"
