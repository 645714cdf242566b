"""YAML texts as configs use them: words of YAML 1.2, and limits that no text gets past."""

import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distgrow.config import apply, load, parse
from distgrow.core.errors import ConfigError
from distgrow.core.yaml_text import MOST_DEPTH, plain, read_file, read_text

BASE = {"growth": {"kind": "constant", "start": 16}, "budget": {"epochs": 1}}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *(("010", 10), ("008", 8), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("-7", -7), ("+7", 7)),
        *(("1e3", 1000.0), ("1.5", 1.5), (".5", 0.5), ("5.", 5.0), (".inf", math.inf), ("-.inf", -math.inf)),
        *(("~", None), ("null", None), ("true", True), ("False", False), ("yes", True), ("off", False)),
        *(("1:30", "1:30"), ("12:30:99", "12:30:99"), ("2026-13-45", "2026-13-45"), ("2026-01-01", "2026-01-01")),
        *(("0x_", "0x_"), ("0b_", "0b_"), ("1__0", "1__0"), ("e3", "e3"), (".", "."), ("-", None), ("text", "text")),
        *(("'010'", "010"), ('"1e3"', "1e3"), ("!!str 5", "5"), ("!!int '5'", 5), ("!!float 5", 5.0), ("! 5", "5")),
    ],
)  # fmt: skip
def test_words_are_those_of_yaml_1_2(word: str, value: Any) -> None:
    if word == "-":
        assert read_text("a: [-1]", "text") == {"a": [-1]}
        return
    got = plain(read_text(f"key: {word}", "text"))["key"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("a: 1\nb: !!int x", 2, "!!int"),
        ("a: !!timestamp x", 1, "!!timestamp"),
        ("a: !!python/object:os.system x", 1, "!!python"),
        ("a: 1\na: 2", 2, "'a'"),
        ("? [a, b]\n: 3", 1, "collection"),
        ("a: &x {b: *x}", 1, "*x"),
        ("a: *x", 1, "*x"),
        ("a: 1\n---\nb: 2", 2, "second document"),
        (f"a: {'9' * 5000}", 1, "5,000 digits"),
        ("[" * 5000 + "]" * 5000, 1, f"{MOST_DEPTH} deep"),
        ("{a: " * 5000 + "}" * 5000, 1, f"{MOST_DEPTH} deep"),
        ("a: 1\nb: [", 2, "not YAML"),
        ("a: 1\n\tb: 2", 2, "not YAML"),
        ("a: {<<: 5}", 1, "merges"),
    ],
)
def test_what_no_config_may_hold_is_refused_by_line(text: str, line: int, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^c\.yaml:{line}: ") as refused:
        read_text(text, "c.yaml")
    assert named in str(refused.value)


def test_a_bomb_of_aliases_is_refused_and_honest_aliases_are_read() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + k)}: &{chr(98 + k)} [{','.join([f'*{chr(97 + k)}'] * 10)}]\n" for k in range(10)
    )
    with pytest.raises(ConfigError, match="100,000 values"):
        read_text(bomb, "text")
    shared = "base: &b {x: 1, y: [2]}\none: *b\ntwo: {<<: *b, x: 3}"
    assert read_text(shared, "text") == yaml.safe_load(shared)


@given(st.text(alphabet=st.sampled_from("ab01 -:{}[],&*!|>'\"#%?<\n\t.~e_\x00é"), max_size=40))
def test_no_text_raises_anything_but_a_config_error(text: str) -> None:
    try:
        read_text(text, "text")
    except ConfigError as error:
        assert str(error).startswith("text")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(values)
def test_what_yaml_writes_is_read_as_it_was(value: Any) -> None:
    text = yaml.safe_dump({"value": value}, default_style='"' if isinstance(value, str) else None)
    read = plain(read_text(text, "text"))
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert float(read["value"]) == float(value)
    else:
        assert read == yaml.safe_load(text)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    loop, large, broken, begins = (tmp_path / name for name in ("loop", "large", "broken", "begins"))
    loop.symlink_to(loop)
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    broken.write_bytes(b"a: 1\nb: \xff\n")
    begins.write_bytes(b"\xef\xbb\xbfa: 1\n")
    for path in (loop, large, tmp_path, tmp_path / "none", tmp_path / ("x" * 5000), Path("a\0b"), Path("/dev/zero")):
        with pytest.raises(ConfigError, match="^" + str(path).replace("\0", "\\x00")[:20].replace("\\x00", ".")):
            read_file(path)
    with pytest.raises(ConfigError, match=r"broken:2: is not UTF-8"):
        read_file(broken)
    assert read_file(begins) == {"a": 1}


@pytest.mark.parametrize(
    "override", ["budget={samples: 1e6}", "budget={samples: 1000000}", "budget={samples: 1_000_000}"]
)
def test_whole_numbers_may_be_written_as_powers_of_ten(override: str) -> None:
    assert parse(apply(dict(BASE), override)).budget.samples == 10**6


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("run.dir=1e3", "run.dir=1e3: must be a text; quote it: dir: '1e3'"),
        ("run.dir=010", "run.dir=010: must be a text; quote it: dir: '010'"),
        ("run.seed=1.50", "run.seed=1.50: "),
        ("budget.samples=1e-3", "budget.samples=1e-3: "),
        ("launch.timeout_s=1:30", "launch.timeout_s='1:30': "),
    ],
)
def test_a_refusal_shows_the_word_as_it_was_written(override: str, shown: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(apply({**BASE, "budget": {}} if override.startswith("budget") else dict(BASE), override))
    assert shown in str(refused.value)


def test_a_padded_seed_is_decimal_so_that_array_jobs_count_up() -> None:
    seeds = [parse(apply(dict(BASE), f"run.seed={k:03d}")).run.seed for k in range(12)]
    assert seeds == list(range(12))


def test_a_home_and_variables_in_paths_are_replaced_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert parse(apply(dict(BASE), "run.dir=~/runs/a")).run.dir == "/somewhere/runs/a"
    assert parse(apply(dict(BASE), "run.dir=$SCRATCH/a")).run.dir == "/scratch/me/a"
    for path in ("$NOT_SET/a", "${NOT_SET}/a", "~nobody_of_this_name/a"):
        with pytest.raises(ConfigError, match="run.dir"):
            parse(apply(dict(BASE), f"run.dir={path}"))


def test_a_relative_run_dir_in_a_package_of_rays_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    for resume in (None, False, True):
        with pytest.raises(ConfigError, match="run.dir=runs/run .* absolute"):
            parse(BASE).folder(resume=resume)
    assert parse(apply(dict(BASE), f"run.dir={tmp_path}/a")).folder(resume=False).path == tmp_path / "a"


def test_a_config_may_come_out_of_a_pipe_whose_writer_takes_its_time() -> None:
    reading, writing = os.pipe()
    text = b"growth: {kind: constant, start: 8}\nbudget: {epochs: 1}\n"
    writer = threading.Timer(0.2, lambda: (os.write(writing, text), os.close(writing)))
    writer.start()
    assert load(f"/dev/fd/{reading}").growth.start == 8
    writer.join()
    os.close(reading)


def test_a_named_pipe_into_which_nobody_writes_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: a config is a mapping"):
        load(tmp_path / "pipe")
