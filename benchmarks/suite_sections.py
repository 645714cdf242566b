"""What the suite writes about each benchmark into a Markdown file: its tables and what they come from, or stale marks.

A section is what stands between the markers of sfo_readme.py. It knows nothing of how a benchmark is run.
"""

import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from paired import hardware
from sfo_readme import marked, write

STALE = "> **Stale**: "
NEVER = "No figures yet."


def today() -> str:
    """The date."""
    return datetime.now(UTC).date().isoformat()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a benchmark's figures come from."""

    command: str
    commit: str
    date: str = field(default_factory=today)


def source(root: Path) -> str:
    """The commit that a folder is at, with a + where what would be measured is not what was committed."""
    try:
        commit = git(root, "rev-parse", "--short", "HEAD")
        changed = git(root, "status", "--porcelain", "--", ".", ":!benchmarks/README.md", ":!benchmarks/plots")
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"
    return f"commit {commit}{'+' if changed else ''}"


def git(root: Path, *words: str) -> str:
    """What git says."""
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def section_of(path: Path, name: str) -> str | None:
    """What stands between a section's markers; None where there are none."""
    begin, end = marked(name)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin not in text:
        return None
    return text.partition(begin)[2].partition(end)[0].strip()


def stale(path: Path, name: str, what: str, run: Run) -> None:
    """Keep a section, and say that the latest run has not renewed it: it `what`."""
    old = (section_of(path, name) or NEVER).splitlines()
    kept = "\n".join(line for line in old if not line.startswith(STALE)).strip()
    write(path, name, f"{STALE}the run of {run.date} at {run.commit} {what}\n\n{kept}")


def finished(path: Path, name: str, run: Run, output: str, images: Sequence[tuple[str, str]]) -> None:
    """Replace a section by what a benchmark has printed, with where that comes from and (caption, file) of images."""
    _, found, rest = output.rpartition("Hardware: ")  # before it stands what libraries have to say
    machine, _, tables = rest.partition("\n") if found else (hardware(), "", output)
    lead = f"`{run.command}` · {run.commit} · {run.date} · {machine.rstrip('.')}"
    pictures = [f"![{caption}]({file})" for caption, file in images]
    write(path, name, "\n\n".join([textwrap.fill(lead, 120, break_on_hyphens=False), tables.strip(), *pictures]))
