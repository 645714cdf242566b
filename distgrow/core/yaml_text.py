"""YAML as configs use it: YAML 1.2 words, bounded size, depth and aliases; every failure names file and line."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distgrow.core.errors import ConfigError

#: Limits of a text: bytes, nested collections, values (with every alias counted as often as it is used), digits.
MOST_BYTES, MOST_DEPTH, MOST_VALUES, MOST_DIGITS = 1 << 20, 64, 100_000, 400

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?\d+(_\d+)*")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(_\d+)*(\.\d*)?)([eE][-+]?\d+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


class WrittenFloat(float):
    """A number that remembers the word it was written as, for error messages."""

    word: str


class WrittenInt(int):
    """An integer that remembers the word it was written as, for error messages."""

    word: str


def read_file(path: str | Path) -> Any:
    """Read a YAML file. Raise ConfigError with file and line if anything is wrong with it."""
    try:
        with os.fdopen(_open_at_once(path), "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give {_files_of(Path(path))}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: is larger than the {MOST_BYTES:,} bytes that a config may have")
    try:
        return read_text(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise ConfigError(f"{path}:{line}: is not UTF-8: {error.reason}") from None


def _files_of(folder: Path) -> str:
    """Return which files of a folder may be configs, for a message."""
    with suppress(OSError):
        if (folder / "config.yaml").is_file():
            return f"the config of its run, {folder / 'config.yaml'}"
        if names := sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml")):
            return "one of its files, such as " + ", ".join(str(folder / name) for name in names[:3])
    return "a YAML file"


def _open_at_once(path: str | Path) -> int:
    """Open a file without waiting for a writer if it is a named pipe. Reading then waits for one that there is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def read_text(text: str, source: str) -> Any:
    """Return the value of a YAML text as plain values, numbers with their words (see `plain`).

    Args:
        text: One YAML document.
        source: What error messages call the text, for example its file.

    Raises:
        ConfigError: names source and line.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{source}: is larger than the {MOST_BYTES:,} bytes that a config may have")
    return _Builder(source).document(text)


def plain(value: Any) -> Any:
    """Return a copy of `value` whose numbers have forgotten how they were written."""
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, WrittenFloat):
        return float(value)
    return int(value) if isinstance(value, WrittenInt) else value


@dataclass(slots=True)
class _Open:
    """A collection under construction."""

    value: Any  #: list or dict
    anchor: str | None
    line: int
    size: int = 1  #: values in it, aliases expanded
    key: Any = None
    has_key: bool = False
    merged: list[dict[Any, Any]] = field(default_factory=list)


class _Builder:
    """Build values from YAML events without recursion, so that no text can exhaust the stack."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._open: list[_Open] = []
        self._result: list[Any] = []

    def document(self, text: str) -> Any:
        documents = 0
        try:
            for event in yaml.parse(text, yaml.SafeLoader):
                documents += isinstance(event, yaml.DocumentStartEvent)
                if documents > 1:
                    raise self._fault(event, "holds a second document (---); a config is one")
                self._take(event)
        except ConfigError:
            raise
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError(f"{self._source}{line}: is not YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{self._source}: is not YAML: {' '.join(str(error).split())}") from None
        return self._result[0] if self._result else None

    def _take(self, event: Any) -> None:
        match event:
            case yaml.ScalarEvent():
                self._add(_scalar(event, self._fault), 1, event)
            case yaml.AliasEvent():
                self._alias(event)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._begin(event)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self._end(event)

    def _begin(self, event: Any) -> None:
        if len(self._open) >= MOST_DEPTH:
            raise self._fault(event, f"is nested more than {MOST_DEPTH} deep")
        kind = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if event.tag not in (None, "!", _TAG + kind):
            raise self._fault(event, f"has the tag {_shown(event.tag)}, which no config needs; remove it")
        self._open.append(_Open({} if kind == "map" else [], event.anchor, event.start_mark.line))

    def _end(self, event: Any) -> None:
        done = self._open.pop()
        for merged in done.merged:
            for key, value in merged.items():
                done.value.setdefault(key, value)
        self._add(done.value, done.size, event, done.anchor)

    def _alias(self, event: Any) -> None:
        if event.anchor not in self._anchors:
            inside = any(outer.anchor == event.anchor for outer in self._open)
            why = "stands inside of what it repeats" if inside else "names no anchor before it"
            raise self._fault(event, f"the alias *{event.anchor} {why}")
        self._add(*self._anchors[event.anchor], event, None)

    def _add(self, value: Any, size: int, event: Any, anchor: str | None = None) -> None:
        anchor = getattr(event, "anchor", None) if isinstance(event, yaml.ScalarEvent) else anchor
        if anchor is not None:
            self._anchors[anchor] = (value, size)
        if not self._open:
            self._result.append(value)
            return
        outer = self._open[-1]
        outer.size += size
        if sum(each.size for each in self._open) > MOST_VALUES:
            raise self._fault(event, f"has more than {MOST_VALUES:,} values once its aliases are expanded")
        if isinstance(outer.value, list):
            outer.value.append(value)
        elif not outer.has_key:
            self._key(outer, value, event)
        else:
            self._value(outer, value, event)

    def _key(self, outer: _Open, key: Any, event: Any) -> None:
        if isinstance(key, list | dict):
            raise self._fault(event, "has a collection as a key; write a word")
        key = plain(key)
        if key != "<<" and key in outer.value:
            raise self._fault(event, f"gives the key {key!r} twice in one mapping; remove one")
        outer.key, outer.has_key = key, True

    def _value(self, outer: _Open, value: Any, event: Any) -> None:
        key, outer.has_key = outer.key, False
        if key != "<<":
            outer.value[key] = value
            return
        merged = value if isinstance(value, list) else [value]
        if not all(isinstance(each, dict) for each in merged):
            raise self._fault(event, "merges (<<) what is no mapping")
        outer.merged += merged

    def _fault(self, event: Any, problem: str) -> ConfigError:
        return ConfigError(f"{self._source}:{event.start_mark.line + 1}: {problem}")


def _scalar(event: Any, fault: Callable[[Any, str], ConfigError]) -> Any:
    """Return a scalar's value by YAML 1.2's core schema; yes, no, on and off are still true and false."""
    text: str = event.value
    if event.tag in (None, "!"):
        return _word(text, event, fault) if event.implicit[0] and event.tag is None else text
    kind = event.tag.removeprefix(_TAG)
    if kind == "str":
        return text
    if kind not in ("int", "float", "bool", "null"):
        raise fault(event, f"has the tag {_shown(event.tag)}, which no config needs; remove it")
    value = _word(text, event, fault)
    value = float(value) if kind == "float" and type(value) is WrittenInt else value
    fits = {"int": int, "float": float, "bool": bool, "null": type(None)}[kind]
    if not isinstance(value, fits) or (kind == "int" and isinstance(value, bool)):
        raise fault(event, f"{text!r} is not of the type that its tag {_shown(event.tag)} says")
    return value


def _word(text: str, event: Any, fault: Callable[[Any, str], ConfigError]) -> Any:
    number: Any
    if text in _WORDS:
        number = _WORDS[text]
        if isinstance(number, float):  # infinite, or none
            number = WrittenFloat(number)
            number.word = text
        return number
    whole, based = _INTEGER.fullmatch(text), _BASED.fullmatch(text)
    if not (whole or based or _FLOAT.fullmatch(text)):
        return text
    if len(text) > MOST_DIGITS:
        raise fault(event, f"has a number of {len(text):,} digits")
    if based:
        number = WrittenInt(text, 0)
    else:
        number = WrittenInt(text.replace("_", "")) if whole else WrittenFloat(text.replace("_", ""))
    number.word = text
    return number


def _shown(tag: str) -> str:
    return tag.replace(_TAG, "!!")
