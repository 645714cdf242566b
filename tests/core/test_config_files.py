"""Overrides that are no assignments and files that are no configs are refused by name."""

import re
from pathlib import Path

import pytest

from distgrow.cli import main
from distgrow.config.load import apply, load, parse
from distgrow.core.errors import ConfigError

BASE = {"lr": {"base": 0.1}}


@pytest.mark.parametrize("override", ["lr.base", "=3", "lr..base=1", ".lr=1", "lr.=1", "", " =1"])
def test_an_override_that_is_no_assignment_is_shown_how_to_read(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"override {override!r} must read key.subkey=value")):
        apply(BASE, override)


@pytest.mark.parametrize("override", ["lr.base=[1", "task={kind: target", "run.dir='open"])
def test_an_override_whose_value_is_not_yaml_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"override {override!r}")):
        apply(BASE, override)


def test_an_override_below_a_plain_value_is_refused_with_the_value() -> None:
    with pytest.raises(ConfigError, match=re.escape("override lr.base.x: base is the value 0.1")):
        apply(BASE, "lr.base.x=3")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"growth: [1", "is not YAML"),
        (b"a: b: c", "is not YAML"),
        (b"", "this is NoneType"),
        (b"- 1\n- 2", "a config is a mapping of keys, this is list"),
        (b"hello", "this is str"),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(content: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=told) as refused:
        load(file)
    assert str(file) in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none.yaml'}: there is no such config file")):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} is a folder: give a YAML file")):
        load(tmp_path)


def test_a_folder_is_refused_with_the_configs_that_are_in_it(tmp_path: Path) -> None:
    (tmp_path / "other.yml").touch()
    with pytest.raises(ConfigError, match=re.escape(f"such as {tmp_path / 'other.yml'}")):
        load(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=re.escape(f"the config of its run, {tmp_path / 'config.yaml'}")):
        load(tmp_path)


@pytest.mark.parametrize("path", ["x" * 5000, "loop/run"])
@pytest.mark.parametrize("verb", ["plan --like", "report", "probe-batch", "train run.dir"])
def test_a_path_that_no_file_can_have_is_exit_code_2_and_no_traceback(
    path: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[tuple[int, str]] = []

    def end(code: int, message: str) -> None:
        ended.append((code, message))
        raise SystemExit(code)

    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "c.yaml").write_text("growth: {kind: constant, start: 8}\nbudget: {steps: 1}\n")
    monkeypatch.chdir(tmp_path)
    command, _, option = verb.partition(" ")
    arguments = {"--like": ["c.yaml", "--like", path], "run.dir": ["c.yaml", f"run.dir={path}"], "": [path]}[option]
    monkeypatch.setattr("sys.argv", ["distgrow", command, *arguments])
    monkeypatch.setattr("distgrow.cli._end", end)
    with pytest.raises(SystemExit):
        main()
    assert ended[0][0] in (1, 2) and path[:20] in ended[0][1]
    assert "Traceback" not in capsys.readouterr().err


def test_the_record_of_a_run_from_a_script_is_not_taken_for_a_config_of_the_default_task(tmp_path: Path) -> None:
    recorded = tmp_path / "config.yaml"
    recorded.write_text("growth: {kind: constant, start: 8}\nbudget: {samples: 64}\n")
    assert load(recorded).task.kind == "digits"
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"config.yaml is the record of a run .*fit\(…, resume=True\)"):
        load(recorded)
    assert load(recorded, ["task.kind=digits"]).task.kind == "digits"


@pytest.mark.parametrize("model", ["{kind: mlp, hidden: [4611686018427387904]}", f"{{kind: mlp, hidden: [{10**30}]}}"])
def test_a_model_that_no_memory_holds_is_refused_with_its_size(model: str) -> None:
    run = parse(apply({"growth": {"kind": "constant", "start": 8}, "budget": {"steps": 1}}, f"model={model}"))
    with pytest.raises(ConfigError, match=r"model: kind=mlp, hidden=\[\d{19,}\] cannot be held in memory"):
        run.task.build(run.model)


def test_a_gpt_that_no_memory_holds_is_refused_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text, " * 200)
    task = f"task={{kind: text, path: {tmp_path}/text, length: 8}}"
    values = apply({"growth": {"kind": "constant", "start": 8}, "budget": {"steps": 1}}, task)
    run = parse(apply(values, "model={kind: gpt, width: 4611686018427387904, heads: 1}"))
    with pytest.raises(ConfigError, match="model: kind=gpt.*width=4611686018427387904.*cannot be held in memory"):
        run.task.build(run.model)
