"""Overrides that are no assignments and files that are no configs are refused by name."""

import re
from pathlib import Path

import pytest

from distgrow.config.load import apply, load
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
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: cannot be read")):
        load(tmp_path)
