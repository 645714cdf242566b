"""Count the rooms, arrows and floors of a package's import graph: `python docs/import_graph.py [PACKAGE]`.

A room is a file, or a folder that is drawn as one room. An arrow leads from a room to a room that it imports. The
floors are the rooms of the longest chain of arrows. Between files, imports at load time count. Between folders, every
import counts: also those within functions, and those for type checkers alone.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

Graph = Mapping[str, frozenset[str]]  #: a room → the rooms that it imports


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Hold the size of an import graph."""

    rooms: int
    floors: int
    arrows: int


def files(package: Path, *, every: bool = False) -> Graph:
    """Return the imports between the files of `package`, a folder. A room's key is its dotted name.

    every: also the imports within functions, and those for type checkers alone.
    """
    modules = {_module(file, package): file for file in sorted(package.rglob("*.py"))}
    return {name: _within(_imports(file, every=every), modules, name) for name, file in modules.items()}


def folders(package: Path) -> Graph:
    """Return every import between the folders of `package`. A file right below it is a room, too."""
    rooms: dict[str, set[str]] = {}
    for name, imported in files(package, every=True).items():
        rooms.setdefault(_room(name), set()).update(_room(each) for each in imported)
    return {room: frozenset(imported - {room}) for room, imported in rooms.items()}


def counts(graph: Graph) -> Counts:
    """Count a graph. Raises graphlib.CycleError if it has a circle."""
    floors: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        floors[room] = 1 + max((floors[each] for each in graph[room]), default=0)
    return Counts(rooms=len(graph), floors=max(floors.values(), default=0), arrows=sum(map(len, graph.values())))


def _imports(file: Path, *, every: bool) -> frozenset[str]:
    """Return the dotted names that a file imports."""
    return frozenset(_names(ast.parse(file.read_text(encoding="utf-8")), every=every))


def _names(node: ast.AST, *, every: bool) -> Iterator[str]:
    """Yield the names that are imported below `node`: `a.b` of `import a.b`, `a` and `a.b` of `from a import b`."""
    if not every and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if not every and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from _names(child, every=every)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _names(child, every=every)


def _within(names: frozenset[str], modules: Mapping[str, Path], own: str) -> frozenset[str]:
    """Keep the names that are modules of the package, without `own`.

    A package whose name stands in a `from` import counts only if nothing of what is imported is itself a module.
    """
    found = {name for name in names if name in modules and name != own}
    return frozenset(name for name in found if not any(other.startswith(f"{name}.") for other in found))


def _module(file: Path, package: Path) -> str:
    """Return the dotted name of a file; a folder's `__init__` has the folder's name."""
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(name: str) -> str:
    """Return the room of a module: the folder or file right below the package."""
    return ".".join(name.split(".")[:2])


def main() -> None:
    """Print both counts of a package, by default distgrow."""
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "distgrow"
    for title, graph in (("files", files(package)), ("folders", folders(package))):
        size = counts(graph)
        print(f"{title:8}{size.rooms:4} rooms{size.floors:4} floors{size.arrows:5} arrows")


if __name__ == "__main__":
    main()
