"""The report's HTML page, which needs no other file: results and plots of all runs, then a section about each."""

import base64
import string
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from typing import Self

from distgrow.report.planned import Planned
from distgrow.report.plots import AXES
from distgrow.report.runs import Record, metrics
from distgrow.report.sections import section, table

_PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>$title</title><style>
$style</style></head><body><h1>$title</h1>
$body
</body></html>
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Where a plot comes from, and its size in pixels, so that nothing moves once it has been decoded."""

    source: str
    width: int
    height: int

    @classmethod
    def of(cls, png: bytes) -> Self:
        """A PNG inside the page itself."""
        width, height = struct.unpack(">II", png[16:24])
        return cls(source=f"data:image/png;base64,{base64.b64encode(png).decode()}", width=width, height=height)

    def at(self, source: str) -> Self:
        """The same, to be loaded from elsewhere."""
        return replace(self, source=source)


def page(
    records: Sequence[Record],
    plots: Mapping[str, bytes],
    planned: Sequence[Planned | None] = (),
    update_s: float | None = None,
) -> str:
    """The whole page, with `plots` as PNGs by the file names of AXES; for `planned` and `update_s` see content."""
    pictures = {file: Picture.of(png) for file, png in plots.items()}
    return frame([record.name for record in records], content(records, pictures, planned, update_s))


def frame(names: Sequence[str], body: str) -> str:
    """A page about the runs of these names, with `body` as HTML."""
    style = files("distgrow.report").joinpath("page.css").read_text(encoding="utf-8")
    return _PAGE.substitute(title=escape(f"distgrow report: {', '.join(names)}"), style=style, body=body)


def content(
    records: Sequence[Record],
    pictures: Mapping[str, Picture],
    planned: Sequence[Planned | None] = (),
    update_s: float | None = None,
) -> str:
    """What a page says of runs, as HTML.

    `pictures` are the plots by the file names of AXES, as far as they are drawn; `planned` are the runs' plans, where
    there are any; `update_s` are the seconds of an update whatever its batch, if they are to be told of.
    """
    plans = [*planned, *[None] * (len(records) - len(planned))]
    images = "\n".join(_image(axis.title, pictures[axis.file]) for axis in AXES.values() if axis.file in pictures)
    sections = [section(record, plan, update_s) for record, plan in zip(records, plans, strict=True)]
    plots = f'<div class="plots">\n{images}\n</div>' if images else '<p class="note">drawing …</p>'
    return "\n".join([f"<section>{_results(records)}</section>", plots, *sections])


def _image(title: str, picture: Picture) -> str:
    size = f'width="{picture.width}" height="{picture.height}"'
    image = f'<img alt="{escape(title)}" {size} src="{escape(picture.source)}">'
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}</figure>"


def _results(records: Sequence[Record]) -> str:
    names = metrics(records)
    rows: list[list[str]] = []
    for record in records:
        last, found = record.last, record.metrics
        tested = [f"{found[name]:.4g}" if name in found else "—" for name in names]
        spent = [f"{record.updates:,}", f"{record.ledger.total:,}", f"{last['samples'] / record.epoch:,.2f}"]
        rows.append([record.name, *tested, *spent, f"{last['time_s']:,.1f}", record.state])
    head = ["run", *(f"test {name}" for name in names), "updates", "SFO", "epochs", "seconds", "state"]
    return table(head, rows, kind="runs")
