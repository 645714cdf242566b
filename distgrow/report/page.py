"""The report's HTML page, which needs no other file: results and curves of all runs, then a section about each."""

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Self

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distgrow.report import hover
from distgrow.report.curves import curve
from distgrow.report.differences import differences
from distgrow.report.marks import MARKS, happened
from distgrow.report.planned import Planned
from distgrow.report.plots import AXES, ESTIMATES, Plot, look
from distgrow.report.runs import Record, metrics
from distgrow.report.sections import section, state

_DASHES = {"-": "none", "--": "7 3", "-.": "7 3 2 3"}
#: Characters for the markers of estimates.
_SIGNS = {"P": "✚"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Hold where a picture comes from, its label, and its size in pixels, so that nothing moves once it is decoded."""

    label: str
    source: str
    width: int
    height: int

    @classmethod
    def of(cls, label: str, png: bytes) -> Self:
        """Return a PNG that is inside the page itself."""
        width, height = struct.unpack(">II", png[16:24])
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        return cls(label=label, source=source, width=width, height=height)

    def at(self, source: str) -> Self:
        """Return the same picture, to be loaded from elsewhere."""
        return replace(self, source=source)


#: Pictures of all panels, by the keys of AXES.
Pictures = Mapping[str, Sequence[Picture]]


def pictures(plots: Mapping[str, Plot]) -> dict[str, list[Picture]]:
    """Return the panels of all plots, inside the page."""
    return {
        axis: [Picture.of(picture.panel.label.replace("\n", " "), picture.png) for picture in plot.panels]
        for axis, plot in plots.items()
    }


def page(
    records: Sequence[Record],
    plots: Mapping[str, Plot],
    planned: Sequence[Planned | None] = (),
    update_s: float | None = None,
) -> str:
    """Return the whole page; for `planned` and `update_s` see content."""
    values = hover.values(records, plots)
    body = content(records, pictures(plots), values, planned, update_s)
    return frame([record.name for record in records], body)


def frame(names: Sequence[str], body: str | None) -> str:
    """Return a page about the runs of these names with `body` as HTML; None: the live page, which fetches it."""
    live, scripts = body is None, ["hover.js"] if body is not None else ["hover.js", "live.js"]
    return _template("page.html").render(
        names=names,
        style=Markup(_file("page.css")),
        scripts=[Markup(_file(name)) for name in scripts],
        content=Markup(body or ""),
        live=live,
    )


def content(
    records: Sequence[Record],
    shown: Pictures,
    values: str = "null",
    planned: Sequence[Planned | None] = (),
    update_s: float | None = None,
) -> str:
    """Return what a page says of runs, as HTML.

    Args:
        records: the runs.
        shown: the panels, as far as they are drawn.
        values: what the page shows where the reader points at a panel, as JSON.
        planned: the runs' plans; None for a run whose config holds none.
        update_s: seconds of an update, whatever its batch, to compare by.
    """
    plans = [*planned, *[None] * (len(records) - len(planned))]
    return _template("content.html").render(
        names=[record.name for record in records],
        runs=[section(record, plan, update_s) for record, plan in zip(records, plans, strict=True)],
        results=_results(records),
        differences=differences(records),
        legend=_legend(records),
        axes=[{"key": key, "short": axis.short, "label": axis.label} for key, axis in AXES.items()],
        pictures=shown,
        values=Markup(values),
    )


def message(text: str) -> str:
    """Return a section that holds a text alone, as HTML."""
    return str(Markup("<section><p>{}</p></section>").format(text))


def _results(records: Sequence[Record]) -> dict[str, Any]:
    names = metrics(records)
    rows: list[list[str]] = []
    for record in records:
        tested = [f"{record.metrics[name]:.4g}" if name in record.metrics else "—" for name in names]
        spent = [f"{record.updates:,}", f"{record.ledger.total:,}", f"{record.last.samples / record.epoch:,.2f}"]
        rows.append([record.name, *tested, *spent, f"{record.last.time_s:,.1f}", state(record)])
    return {
        "head": ["run", *(f"test {name}" for name in names), "updates", "SFO", "epochs", "seconds", "state"],
        "rows": rows,
    }


def _legend(records: Sequence[Record]) -> dict[str, Any]:
    """Return the keys of the runs, and of the estimates and marks that occur."""
    looks = [(record.name, look(index)) for index, record in enumerate(records)]
    lines = [
        {"name": name, "colour": shape["color"], "width": 3, "dashes": _DASHES[shape["linestyle"]]}
        for name, shape in looks
    ]
    marks = [
        {"name": mark.label, "sign": mark.sign}
        for mark in MARKS
        if any(happened(record, mark.kind) for record in records)
    ]
    for source, (name, shape) in ESTIMATES.items():
        if any(len(curve(record, *source).values) for record in records):
            if "marker" in shape:
                marks.append({"name": name, "sign": _SIGNS[shape["marker"]]})
            else:
                lines.append({"name": name, "colour": "#777777", "width": 2, "dashes": "2 3"})
    return {"lines": lines, "marks": marks}


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("distgrow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> Any:
    return _environment().get_template(name)


def _file(name: str) -> str:
    return files("distgrow.report").joinpath(name).read_text(encoding="utf-8")
