"""What benchmarks write into a Markdown file: sections between markers; all else is left as it is."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from paired import Report


def marked(name: str) -> tuple[str, str]:
    """The lines around a section that is generated."""
    return f"<!-- {name}: generated -->", f"<!-- {name}: end -->"


def replaced(text: str, name: str, section: str) -> str:
    """`text` with the section between its markers, which are appended where they are missing."""
    begin, end = marked(name)
    block = f"{begin}\n{section.strip()}\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{begin} has no {end} after it; put it back, or remove both")
    return before + block + after


def write(path: Path, name: str, section: str) -> None:
    """Put a section into a file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(replaced(text, name, section), encoding="utf-8")


def markdown(report: Report) -> str:
    """A table."""
    lines = [f"**{report.title}**", ""]
    for cells in (report.columns, ["---"] * len(report.columns), *report.rows):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def section(title: str, lead: str, reports: Sequence[Report], images: Sequence[tuple[str, str]]) -> str:
    """A heading, paragraphs, tables and (caption, file) images."""
    words = [textwrap.fill(paragraph, 120, break_on_hyphens=False) for paragraph in lead.split("\n\n")]
    parts = [f"### {title}", *words, *map(markdown, reports), *(f"![{caption}]({file})" for caption, file in images)]
    return "\n\n".join(parts)
