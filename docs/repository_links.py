"""A hook of mkdocs that turns the repository's files that a page links to into pages of the site.

The manual's links are relative paths, so that they work wherever the repository is shown. A site holds only what is in
docs/. So this hook adds Markdown and pictures as they are, and any other file as a page that shows its text.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".sbatch": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files that the site's pages link to, and those that these link to in turn."""
    root = Path(config.config_file_path).parent
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        for target in _targets(root, waiting.pop()):
            if files.get_file_from_path(_place(target)) is None:
                files.append(_taken(config, root / target, _place(target)))
                waiting += [target] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Return the page's text with links to the places of the repository's files in the site."""
    root, here = Path(config.config_file_path).parent, page.file.src_uri
    path = f"docs/{here}" if (root / "docs" / here).is_file() else here
    if not (root / path).is_file():
        return markdown  # the text of a file that is no Markdown

    def led(found: "re.Match[str]") -> str:
        target = _joined(path, found[1])
        inside = (root / target).is_file()
        return posixpath.relpath(_place(target), posixpath.dirname(here) or ".") if inside else found[1]

    return LINK.sub(led, markdown)


def _targets(root: Path, path: str) -> Iterator[str]:
    """Yield the repository's files outside docs/ that a page links to."""
    for link in LINK.findall((root / path).read_text(encoding="utf-8")):
        target = _joined(path, link)
        if not target.startswith(("docs/", "..")) and (root / target).is_file():
            yield target


def _joined(path: str, link: str) -> str:
    """Return the repository's path that a link in the file at `path` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _place(target: str) -> str:
    """Return the place of a repository's file in the site."""
    whole = target.startswith("docs/") or target.endswith((".md", ".png"))
    return target.removeprefix("docs/") if whole else f"{target}.md"


def _taken(config: MkDocsConfig, file: Path, place: str) -> File:
    """Return a file of the repository as a file of the site."""
    if file.name == Path(place).name:
        return File.generated(config, place, abs_src_path=str(file))
    fence = f"`````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8').rstrip()}\n`````"
    title = place.removesuffix(".md")
    shown = f"---\ntitle: {title}\nsearch: {{exclude: true}}\n---\n# `{title}`\n\n{fence}\n"
    return File.generated(config, place, content=shown, inclusion=InclusionLevel.NOT_IN_NAV)
