"""The manual is true to the code: configs in it can be run, what is generated is current, links lead somewhere."""

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import fit_reference
import generate
import pytest
import reference
import typer
import yaml
from conftest import ROOT
from typer.core import TyperGroup

import distgrow
from distgrow.cli import app
from distgrow.config.load import load, parse
from distgrow.core.spec import Spec
from distgrow.growth import Growth
from distgrow.planning import table

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "benchmarks/README.md"])
KINDS = [policy.model_fields["kind"].default for policy in get_args(get_args(Growth)[0])]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_config_of_the_manual_can_be_planned(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = parse({"budget": {"epochs": 40}, **yaml.safe_load(block)})
    assert table.show(run, None, 40)
    assert "gradient evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_growth_has_a_page_with_a_config_of_its_own(kind: str) -> None:
    page = (ROOT / f"docs/policies/{kind}.md").read_text()
    for title in ("Formula", "Config", "When, and when not", "What it costs", "What `plan` shows", "What was seen"):
        assert f"\n## {title}\n" in page
    assert re.search(rf"```yaml\ngrowth: {{kind: {kind}[,}}]", page)
    assert f"](policies/{kind}.md)" in (ROOT / "docs/policies.md").read_text()


# ── what is generated ───────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_generated_is_current() -> None:
    for page, text in generate.pages().items():
        assert page.read_text() == text, f"{page.name} is not current; run python docs/generate.py"


def all_specs(spec: type[Spec] = Spec) -> Iterator[type[Spec]]:
    """Every spec of the package that can be built, found without going through the config."""
    for inner in spec.__subclasses__():
        if inner.__module__.startswith("distgrow."):
            yield inner
            yield from all_specs(inner)


def test_every_key_has_a_docstring_and_a_row_with_its_default() -> None:
    page = reference.configuration()
    abstract = {"GrowthPolicy", "Capped", "Geometrical", "Aimed", "Adaptive", "Endless", "Tracker", "Replacing"}
    abstract |= {"Run", "Settings", "Branch", "Recorded", "Given"}  # sections of the page; no part of a config
    for spec in all_specs():
        for name, field in spec.model_fields.items():
            if spec.__name__ in abstract or name == "kind" or field.init is False:
                continue
            assert field.description, f"{spec.__name__}.{name}"
            told = " ".join(field.description.split()).replace("|", "\\|")
            assert re.search(rf"^\| `{name}` \| .* \| {re.escape(told)} \|$", page, re.M), f"{spec.__name__}.{name}"


@pytest.mark.parametrize(
    "kind",
    [
        "auto",
        "linear",
        "exponential",
        "late",
        "matched",
        "seesaw",
        "norm_threshold",
        "progress_test",
        "noise_scale",
        "cabs",
    ],
)
def test_the_defaults_that_the_reference_tells_are_those_of_the_config(kind: str) -> None:
    section = reference.configuration().split(f"### `growth: {{kind: {kind}}}`")[1].split("\n### ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .*? \| `(.*?)` \| ", section, re.M)
    assert len(rows) >= 3
    told = {name: yaml.safe_load(default) for name, default in rows}
    bare = {"growth": {"kind": kind}, "budget": {"epochs": 40}}
    assert parse({**bare, "growth": {"kind": kind, **told}}).growth == parse(bare).growth


def test_ranges_are_told() -> None:
    page = reference.configuration()
    assert "| `factor` | number > 1, ≤ 1,000,000 | `2.0` |" in page
    assert "| `steps` | integer ≥ 1, ≤ 2^62 or `null` | `null` |" in page
    assert "| `precision` | `float32`, `bfloat16`, `float64` | `float32` |" in page


def test_a_page_that_is_not_current_fails_the_check_and_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "HEAD", "# Another configuration\n")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert "docs/configuration.md" in str(ended.value.code)
    assert "python docs/generate.py" in str(ended.value.code)


def test_the_tree_of_the_architecture_has_every_folder_and_no_other() -> None:
    tree = (ROOT / "docs/architecture.md").read_text().split("<!-- tree: ")[1]
    told = dict(re.findall(r"^\| `(\S+)` \| (.*) \|$", tree, re.M))
    package = ROOT / "distgrow"
    folders = {f"{folder.parent.name}/" for folder in package.glob("*/__init__.py")}
    assert set(told) == folders | {file.name for file in package.glob("*.py")}
    assert all(len(sentence) > 20 for sentence in told.values())


def test_every_page_begins_with_what_the_reader_can_do_and_leads_to_the_glossary() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        opening = page.read_text().split("\n## ")[0]
        assert "After this page" in opening, page
        assert "glossary.md" in opening or page.name == "glossary.md", page


def test_the_page_of_fit_has_a_row_for_every_argument_and_public_name() -> None:
    page = fit_reference.page()
    arguments, names = page.split("## Every public name")
    for name in inspect.signature(distgrow.fit).parameters:
        assert f"\n| `{name}` | " in arguments
    for name in distgrow.__all__:
        assert f"\n| `{name}` | " in names


def test_sections_of_a_docstring_become_rows() -> None:
    docstring = """Do it.

    More of it.

    Args:
        size: Rows of a batch,
            at least 1.
        mode (str): How.

    Raises:
        ConfigError: If not.
    """
    parts = fit_reference.parts(docstring)
    assert parts[""] == "Do it.\n\nMore of it."
    assert fit_reference.entries(parts["Args"]) == {"size": "Rows of a batch, at least 1.", "mode": "How."}
    assert fit_reference.entries(parts["Raises"]) == {"ConfigError": "If not."}
    assert fit_reference.first_sentence(docstring) == "Do it."


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────


def commands() -> Iterator[str]:
    """Yield the commands of distgrow in the console blocks of all pages."""
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("$ ") and re.search(r"\bdistgrow (?:train|plan|verify|report|probe-batch)\b", line):
                    yield re.sub(r"^.*?\bdistgrow (?=\w+)", "", line)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_of_the_manual_has_a_verb_options_and_keys_that_exist(command: str) -> None:
    verb, *words = shlex.split(command, comments=True)
    verbs = typer.main.get_command(app)
    assert isinstance(verbs, TyperGroup)
    context = verbs.commands[verb].make_context(verb, words)
    config = context.params.get("config")
    if config is not None and (ROOT / config).is_file():
        load(str(ROOT / config), context.params["overrides"] or ())


# ── links, and the site ─────────────────────────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, code left out."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(), flags=re.M | re.S)
    return {reference.slug(title) for title in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text):
        path, _, anchor = link.partition("#")
        if "://" not in path:
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{link}: there is no such file"
            assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def test_the_site_builds_strictly_and_its_pages_fetch_nothing(tmp_path: Path) -> None:
    words = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    fetched = re.compile(
        r"<(?:script|img|iframe|link rel=\"(?:stylesheet|preconnect)\")[^>]*(?:src|href)=\"?(https?:)?//"
    )
    for page in [*pages, *tmp_path.rglob("*.css")]:
        assert not fetched.search(page.read_text()), page
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", page.read_text()), page
