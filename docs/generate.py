"""What the manual says of the code, made from the code: `python docs/generate.py`; with `--check` it only compares.

The configuration reference; what `distgrow plan` shows of the configs on the policies' pages; and, on the page of the
architecture, the loop, the tree of files and the layers of imports.
"""

import ast
import inspect
import io
import re
import sys
import textwrap
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import reference
import yaml

from distgrow.config.load import parse
from distgrow.planning import table
from distgrow.training.trainer import Trainer

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "distgrow"
TEXT = "(?:(?!```).)*"
PLAN = re.compile(rf"(```yaml\n({TEXT})```{TEXT}```console\n\$ distgrow plan \S+(?: --rows (\d+))?\n){TEXT}(```)", re.S)
SECTION = "<!-- {name}: generated -->\n{text}\n<!-- {name}: end -->"


def pages() -> dict[Path, str]:
    """What the generated pages, and those with generated parts, have to hold."""
    made = {DOCS / "configuration.md": reference.configuration()}
    for page in sorted((DOCS / "policies").glob("*.md")):
        made[page] = PLAN.sub(_planned, page.read_text(encoding="utf-8"))
    made[DOCS / "architecture.md"] = _architecture((DOCS / "architecture.md").read_text(encoding="utf-8"))
    return made


def _planned(found: "re.Match[str]") -> str:
    """A config, and below it what `distgrow plan` prints of it."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        table.show(parse(yaml.safe_load(found[2])), None, int(found[3] or 40))
    return found[1] + "".join(f"{line.rstrip()}\n" for line in shown.getvalue().splitlines()) + found[4]


def _architecture(page: str) -> str:
    """The page with its generated sections."""
    loop = textwrap.dedent(inspect.getsource(Trainer.train))
    for name, text in {
        "loop": f"```python\n{loop}```",
        "tree": _tree(),
        "layers": f"```text\n{_layers()}\n```",
    }.items():
        inside = re.compile(SECTION.format(name=name, text=".*"), re.S)
        page = inside.sub(lambda _, name=name, text=text: SECTION.format(name=name, text=text), page)
    return page


def _tree() -> str:
    """Every module of the package, and the sentence that it opens with."""
    modules = sorted(PACKAGE.rglob("*.py"), key=lambda file: (file.parent != PACKAGE, str(file)))
    rows = (f"| `{file.relative_to(ROOT)}` | {_opening(file).replace('|', chr(92) + '|')} |" for file in modules)
    return "\n".join(["", "| module | what it owns |", "| --- | --- |", *rows, ""])


def _opening(file: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0].rstrip(".")


def _layers() -> str:
    """The layers of import-linter's contract, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    return "\n".join(layer.replace("distgrow.", "") for layer in contract["layers"])


def main() -> None:
    """Write the pages, or tell which are not current: exit code 1."""
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
