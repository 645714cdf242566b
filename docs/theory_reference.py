"""The page of the formulas: what each gives, its source, and which files use it, made from docstrings and imports."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import fit_reference

HEAD = """\
# Formulas

After this page you can find the formula behind a policy, a prediction of `plan` or a probe, see its units and its
source, and compute it with numbers of your own. The [glossary](glossary.md) explains words such as *stage* and *SFO*.

Numbers go in and numbers come out: no formula needs torch, a model or a run. Each is imported from the module that its
heading names. For example, the batch that reaches ‖∇f‖ = 0.5 with the fewest gradient evaluations:

```python
from distgrow.theory.sgd import Constants, critical_batch

problem = Constants(smoothness=2.0, variance=3.0, gap=2.0)  # L, σ² and f(θ₀) − f*
print(critical_batch(problem, lr=0.1, epsilon=0.5))  # about 2.67 samples
```

"Used by" names the files that use a formula, directly or through another one. "For tables and tests" means that no file
does: such a formula is there for tables of your own, and a test holds it true.

This page is made from the code: `python docs/generate.py` makes it again.
"""
ROOT = Path(__file__).parent.parent
MODULES = (
    "sgd",
    "staged",
    "last_iterate",
    "noise",
    "scaling_law",
    "allocation",
    "finite_sum",
    "parts",
    "samplings",
    "staleness",
    "experts",
    "extrapolation",
    "pruning",
)
NOBODY = "for tables and tests"


def page() -> str:
    """Return the whole page."""
    used = users()
    return "\n".join([HEAD, *(line for name in MODULES for line in _module(name, used))])


def formulas(name: str) -> dict[str, Any]:
    """Return the public functions, classes and methods of a module of the theory: name → object."""
    module = importlib.import_module(f"distgrow.theory.{name}")
    found: dict[str, Any] = {}
    for key, thing in _public(module):
        found[key] = thing
        if inspect.isclass(thing):
            found |= {f"{key}.{method}": function for method, function in _public(thing)}
    return found


def source(docstring: str | None) -> str:
    """Return what a docstring names as the source, or ""."""
    match = re.search(r"^Source: (.*?)\.?$", inspect.cleandoc(docstring or ""), re.M)
    return match[1] if match else ""


def users() -> dict[str, set[str]]:
    """Return the files outside the theory that use each formula, directly or through another: name → paths."""
    within = {name: set(formulas(name)) for name in MODULES}
    known = set().union(*within.values())
    used: dict[str, set[str]] = {name: set() for name in known}
    for path in [*ROOT.glob("distgrow/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        file = path.relative_to(ROOT).as_posix()
        if not file.startswith("distgrow/theory/"):
            for name in _imported(ast.parse(path.read_text(encoding="utf-8")), known):
                used[name].add(file.removeprefix("distgrow/"))
    calls = {name: inner for module in MODULES for name, inner in _calls(module, known).items()}
    for name in known:
        for inner in _reached(name, calls):
            used[inner] |= used[name]
    return used


def _imported(tree: ast.Module, known: set[str]) -> set[str]:
    """Return the formulas that a file imports, those it reaches through a module, and the methods that it calls."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    origins = [node for node in imports if (node.module or "").startswith("distgrow.theory")]
    found = {alias.name for node in origins for alias in node.names} & known
    modules = _modules(tree)
    for node in ast.walk(tree) if origins else ():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found |= {node.attr} & known
        elif isinstance(node, ast.Call):
            found |= _methods(node, known, modules)
    return found


def _calls(module: str, known: set[str]) -> dict[str, set[str]]:
    """Return the formulas that each formula of a module names or calls: name → names."""
    tree = ast.parse((ROOT / f"distgrow/theory/{module}.py").read_text(encoding="utf-8"))
    modules = _modules(tree)
    found: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _named(node, known, modules)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = _named(method, known, modules) | {node.name}
    return {name: names for name, names in found.items() if name in known}


def _modules(tree: ast.Module) -> set[str]:
    """Return the names by which a file calls modules: `np`, `math`, and those of the theory."""
    found = {
        alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    theory = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "distgrow.theory"]
    return found | {alias.asname or alias.name for node in theory for alias in node.names}


def _named(node: ast.AST, known: set[str], modules: set[str]) -> set[str]:
    """Return the formulas that occur in a piece of code."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & known
    return names.union(*(_methods(part, known, modules) for part in ast.walk(node) if isinstance(part, ast.Call)))


def _methods(call: ast.Call, known: set[str], modules: set[str]) -> set[str]:
    """Return the methods that a call may be one of, by its name. A function of a module is none."""
    if not isinstance(call.func, ast.Attribute):
        return set()
    if isinstance(call.func.value, ast.Name) and call.func.value.id in modules:
        return set()
    return {name for name in known if name.endswith(f".{call.func.attr}")}


def _reached(name: str, calls: Mapping[str, set[str]]) -> set[str]:
    """Return all formulas that one is computed from."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        new = calls.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def _public(owner: ModuleType | type) -> Iterator[tuple[str, Any]]:
    """Yield the public functions and classes that a module or a class defines, in the order of the code."""
    module = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    for name, thing in vars(owner).items():
        if not name.startswith("_") and callable(thing) and getattr(thing, "__module__", None) == module:
            yield name, thing


def _module(name: str, used: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield a module's section: its docstring, and a row for each formula."""
    docstring = inspect.getdoc(importlib.import_module(f"distgrow.theory.{name}"))
    yield from (f"## `distgrow.theory.{name}`", "", _escaped(docstring or ""), "")
    yield from ("| formula | what it gives | source | used by |", "| --- | --- | --- | --- |")
    found = formulas(name)
    for key, thing in found.items():
        gives = fit_reference.first_sentence(thing.__doc__).removeprefix("Return ")
        origin = source(thing.__doc__) or source(found[key.split(".")[0]].__doc__)
        files = ", ".join(f"`{file}`" for file in sorted(used[key])) or NOBODY
        yield fit_reference.row(f"`{key}`", _escaped(gives), origin, files)
    yield ""


def _escaped(text: str) -> str:
    """Return text in which asterisks and underscores outside code are no Markdown."""
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_])", r"\\\1", part) for part in re.split("(`.*?`)", text)
    )
