"""What cannot be reported is named, and nothing is left half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import Script, short

from distgrow.core.errors import ConfigError, RunError
from distgrow.report.runs import read
from distgrow.report.write import write


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = short().save(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    record = read([run])[0]
    assert [event.kind for event in record.events] == ["start", "stage", "stage", "eval", "end"]
    assert record.steps["step"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    run = short().save(tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    with pytest.raises(ConfigError, match=rf"{run}/{file} does not exist; name the run.dir"):
        write([run], None)


def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    run = short().save(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/typo/config.yaml does not exist; name the run.dir"):
        write([run, str(tmp_path / "typo")], None)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "metrics.jsonl"}
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"event": "step", oops}', r"""'\{"event": "step", oops\}' is not JSON; repair or remove that line"""),
        ("", "'' is not JSON; repair or remove that line"),
        ("[1, 2]", r"'\[1, 2\]' lacks one of event, step, samples, time_s; repair or remove that line"),
        ('{"event": "step"}', "lacks one of event, step, samples, time_s; repair or remove that line"),
        (
            '{"event": "step", "step": 1, "samples": 8, "time_s": 1.0}',
            "lacks epoch, stage, batch, lr, loss, grad_norm, sfo",
        ),
        ("x" * 10_000, "'x{80} …' is not JSON"),
    ],
)
def test_a_damaged_line_is_shown(tmp_path: Path, line: str, fault: str) -> None:
    run = short().save(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines()
    metrics.write_text("\n".join([first, line, *others, ""]))
    with pytest.raises(ConfigError, match=rf"{metrics}:\d+ is damaged: the line .*{fault}"):
        write([run], None)


@pytest.mark.parametrize(
    ("kind", "key", "value", "fault"),
    [
        ("step", "batch", 0, "holds batch=0, which must be a whole number above 0"),
        ("step", "samples", None, "holds samples=None, which must be a whole number above 0"),
        ("step", "epoch", 0, "holds epoch=0, which must be a finite number above 0"),
        ("step", "event", [], "lacks one of event, step, samples, time_s"),
        ("stage", "batch", None, "holds batch=None, which must be a whole number above 0"),
        ("stage", "lr", "x", "holds lr='x', which must be a finite number of at least 0"),
        ("end", "sfo", "abc", "holds sfo='abc', which must be a whole number of at least 0"),
        ("end", "sfo_skipped", None, "holds sfo_skipped=None, which must be a whole number of at least 0"),
    ],
)
def test_a_line_whose_numbers_cannot_be_is_named(tmp_path: Path, kind: str, key: str, value: Any, fault: str) -> None:
    run = short().save(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    next(line for line in lines if line["event"] == kind)[key] = value
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=rf"{metrics}:\d+ is damaged: the line .*{fault}"):
        write([run], None)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("config.yaml", "cannot be read: .*; repair its config.yaml or metrics.jsonl"),
        ("metrics.jsonl", "metrics.jsonl:1 is damaged: the line .* is not JSON; repair or remove that line"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, file: str, told: str) -> None:
    run = short().save(tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match=rf"{run}.*{told}"):
        write([run], None)


def test_a_run_without_an_update_is_told_to_wait(tmp_path: Path) -> None:
    run = Script().event("start").stage(0, 8, 8).skip().save(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"{run}/metrics.jsonl holds no update yet; wait for the run, or lower"):
        write([run], None)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = short().save(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=rf"cannot write to {tmp_path}/file/out: Not a directory; .* --out"):
        write([run], str(tmp_path / "file" / "out"))
