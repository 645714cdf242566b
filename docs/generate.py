"""Make the parts of the manual that follow from the code: `python docs/generate.py`; with `--check` only compare them.

These are the configuration reference, the pages of fit() and of the formulas, the output of `distgrow plan` on the
policies' pages, what policies need and refuse, and on the page of the architecture the loop, the folders and the layers
of imports.
"""

import ast
import inspect
import io
import re
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import fit_reference
import policy_table
import reference
import theory_reference
import yaml

from distgrow.config.load import parse
from distgrow.planning import table
from distgrow.training.trainer import Trainer

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "distgrow"
TEXT = "(?:(?!```).)*"
PLAN = re.compile(rf"(```yaml\n({TEXT})```{TEXT}```console\n\$ distgrow plan \S+(?: --rows (\d+))?\n){TEXT}(```)", re.S)
LIBRARY = 4_800_000  #: bytes that stand for the sources of the standard library
SECTION = "<!-- {name}: generated -->\n{text}\n<!-- {name}: end -->"


def pages() -> dict[Path, str]:
    """Return the text that each page has to hold, if all or a part of it is generated."""
    made = {
        DOCS / "configuration.md": reference.configuration(),
        DOCS / "fit.md": fit_reference.page(),
        DOCS / "theory.md": theory_reference.page(),
    }
    for page in sorted((DOCS / "policies").glob("*.md")):
        made[page] = PLAN.sub(_planned, page.read_text(encoding="utf-8"))
    for page, sections in {
        DOCS / "architecture.md": {"loop": _loop(), "tree": _tree(), "layers": _layers()},
        DOCS / "can-and-cannot.md": {"policies": policy_table.table()},
    }.items():
        made[page] = _with_sections(page, sections)
    return made


def _planned(found: "re.Match[str]") -> str:
    """Return a config, and below it what `distgrow plan` prints of it."""
    shown, values = io.StringIO(), yaml.safe_load(found[2])
    with redirect_stdout(shown), tempfile.TemporaryDirectory() as folder:
        if values.get("task", {}).get("kind") == "text":  # the standard library, which is another one in each Python
            values["task"]["path"] = str(Path(folder) / "sources.py")
            Path(values["task"]["path"]).write_text("#" * LIBRARY)
        table.show(parse(values), None, int(found[3] or 40))
    return found[1] + "".join(f"{line.rstrip()}\n" for line in shown.getvalue().splitlines()) + found[4]


def _with_sections(page: Path, sections: Mapping[str, str]) -> str:
    """Return a page's text with its generated sections made anew."""
    text = page.read_text(encoding="utf-8")
    for name, made in sections.items():
        inside = re.compile(SECTION.format(name=name, text=".*"), re.S)
        assert inside.search(text), f"{page.name} has no section {name}"
        text = inside.sub(lambda _, name=name, made=made: SECTION.format(name=name, text=made), text)
    return text


def _loop() -> str:
    """Return the Trainer's loop, as it is in the code."""
    return f"```python\n{textwrap.dedent(inspect.getsource(Trainer.train))}```"


def _tree() -> str:
    """Return a table of the package's folders and of the files beside them, with the sentence that each opens with."""
    folders = sorted(file.parent for file in PACKAGE.glob("*/__init__.py"))
    rows = [f"| `{folder.name}/` | {_opening(folder / '__init__.py')} |" for folder in folders]
    rows += [f"| `{file.name}` | {_opening(file)} |" for file in sorted(PACKAGE.glob("*.py"))]
    return "\n".join(["", "| in `distgrow/` | what it is for |", "| --- | --- |", *rows, ""])


def _opening(file: Path) -> str:
    """Return the first line of a module's docstring, fit for a table."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0].rstrip(".").replace("|", "\\|")


def _layers() -> str:
    """Return the layers of import-linter's contract, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    layers = "\n".join(layer.replace("distgrow.", "") for layer in contract["layers"])
    return f"```text\n{layers}\n```"


def main() -> None:
    """Write the pages. With --check, name those that are not current and exit with code 1."""
    stale = {page: text for page, text in pages().items() if not page.exists() or page.read_text("utf-8") != text}
    if "--check" not in sys.argv[1:]:
        for page, text in stale.items():
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    elif stale:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        sys.exit(f"not current: {names}; python docs/generate.py makes them again")


if __name__ == "__main__":
    main()
