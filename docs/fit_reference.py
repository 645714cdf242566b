"""The page of fit() and of every public name, made from signatures and docstrings."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import distgrow
from distgrow.training.fit import fit
from distgrow.training.result import Result

HEAD = """\
# `fit()` and the public names

After this page you can call `fit()` with every argument that it takes, and find any other name that `distgrow`
exports. [From plain DDP](from/ddp.md) shows a whole script. The [glossary](glossary.md) explains words such as *stage*.

This page is made from the code: `python docs/generate.py` makes it again.
"""
SECTIONS = ("Args", "Returns", "Raises", "Yields", "References", "Example", "Examples")
DOC = str | None


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *_fit(), *_examples(), *_result(), *_names()])


def parts(docstring: DOC) -> dict[str, str]:
    """Split a Google-style docstring at its sections. The key "" holds what comes before the first one."""
    found: dict[str, list[str]] = {"": []}
    section = ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        title = line.rstrip().removesuffix(":")
        if title in SECTIONS and line.rstrip().endswith(":"):
            section = title
            found[section] = []
        else:
            found[section].append(line)
    return {name: inspect.cleandoc("\n".join(lines)) for name, lines in found.items()}


def entries(section: str) -> dict[str, str]:
    """Return the entries of an Args or Raises section: name → text on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = re.match(r"(\*{0,2}\w+)(?: \(.*?\))?: (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def first_sentence(docstring: DOC) -> str:
    """Return the first sentence of a docstring, on one line."""
    summary = parts(docstring)[""].split("\n\n")[0]
    return " ".join(summary.split())


def _fit() -> Iterator[str]:
    """Yield the signature of fit, its description, a row for each argument, and its errors."""
    told = parts(fit.__doc__)
    arguments = entries(told.get("Args", ""))
    yield from ("## `fit()`", "", "```text", *_signature(), "```", "", told[""], "")
    yield from ("| argument | type | default | what |", "| --- | --- | --- | --- |")
    for name, parameter in inspect.signature(fit).parameters.items():
        default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        yield row(f"`{name}`", f"`{_type(parameter.annotation)}`", default, arguments.get(name, ""))
    yield ""
    for title in ("Returns", "Raises"):
        if title in told:
            yield from (f"**{title}**", "", *_list(told[title]), "")


def examples() -> dict[str, str]:
    """Return docs/fit_examples.py in parts: by argument, and under "" what all of them share."""
    text = (Path(__file__).parent / "fit_examples.py").read_text(encoding="utf-8")
    shared, *others = re.split(r"^# %% ", text, flags=re.M)
    shared = shared.partition('"""\n\n')[2]  # without the module's docstring
    return {"": shared.strip()} | {name: code.strip() for name, _, code in (each.partition("\n") for each in others)}


def _examples() -> Iterator[str]:
    """Yield the script of examples, part by part."""
    yield from (
        "## An example of each argument",
        "",
        "They are one script, `docs/fit_examples.py`, which the tests run.",
        "",
    )
    for name, code in examples().items():
        yield from ([f"### `{name}`", ""] if name else [])
        yield from ("```python", code, "```", "")


def _signature() -> Iterator[str]:
    """Yield the call of fit as a reader types it: the three that have to be given, then keywords."""
    named = [p.name for p in inspect.signature(fit).parameters.values() if p.kind is p.KEYWORD_ONLY]
    yield "result = distgrow.fit(model, loss, train, *, " + ", ".join(f"{name}=…" for name in named[:2]) + ", …)"


def _list(section: str) -> Iterator[str]:
    """Yield a section's entries as a list, or its text if it has none."""
    listed = entries(section)
    yield from (f"- `{name}`: {text}" for name, text in listed.items()) if listed else [section]


def _result() -> Iterator[str]:
    """Yield the fields of what fit returns."""
    yield from ("## `Result`", "", first_sentence(Result.__doc__), "", "| field | type |", "| --- | --- |")
    for field in dataclasses.fields(Result):
        yield row(f"`{field.name}`", f"`{_type(field.type)}`")
    yield ""


def _names() -> Iterator[str]:
    """Yield a row for every name that the package exports."""
    yield from ("## Every public name", "", "Import each with `from distgrow import …`.", "")
    yield from ("| name | arguments | what |", "| --- | --- | --- |")
    for name in sorted(distgrow.__all__, key=str.lower):
        thing: Any = getattr(distgrow, name)
        yield row(f"`{name}`", _arguments(thing), first_sentence(thing.__doc__))
    yield ""


def _arguments(thing: Any) -> str:
    """Return the names of a callable's arguments with their defaults."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return "an error"
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    shown = [p.name if p.default is p.empty else f"{p.name}={_value(p.default)}" for p in parameters]
    return f"`{', '.join(shown)}`" if shown else ""


def _value(default: Any) -> str:
    """Return a default short enough for a table."""
    text = repr(default)
    return text if len(text) <= 24 else "…"


def _type(annotation: Any) -> str:
    """Return a type as it is written, without the names of modules; of a long union the first two members."""
    members = list(_members(annotation))
    return " | ".join(members if len(members) < 5 else [*members[:2], "…"])


def _members(annotation: Any) -> Iterator[str]:
    """Yield the names of a union's members. What `Annotated` adds is left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        yield "None" if annotation is type(None) else re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
