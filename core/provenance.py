"""The package's own source that modules are made of: each module, and all that is imported with it.

What is kept between runs is named by it, so that an edited module makes anew what depends on it, and nothing else.
Read from the source files alone: every process finds the same, whatever else it has imported.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..errors import InternalError

PACKAGE = __name__.partition(".")[0]
ROOT = Path(__file__).parents[1]
# Python 3.11 and older count the depth of a parse for the whole process: two at once fail (cpython 106905).
_parsing = threading.Lock()


def modules_behind(*modules: str) -> tuple[str, ...]:
    """Names of these modules and of those of the package that are imported with them, sorted.

    An import inside a function is not followed: such a one chooses (a backend, say), and what was chosen is to be named
    here by itself. Of a module from outside the package, the imports are followed all the same.
    """
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imported_by(name)
    return tuple(sorted(found))


@cache
def source_digest(*modules: str) -> str:
    """sha256 of the source of `modules_behind` these, names included.

    Raises:
        InternalError: the package is installed without its source, or has no such module.
    """
    digest = hashlib.sha256()
    for name in modules_behind(*modules):
        path = _file_of(name)
        if path is None and name.partition(".")[0] == PACKAGE:
            raise InternalError(f"no source of {name} in {ROOT}")
        source = b"" if path is None else path.read_bytes()
        digest.update(f"{name} {len(source)}\0".encode() + source)
    return digest.hexdigest()


@cache
def _imported_by(module: str) -> tuple[str, ...]:
    """Modules of the package whose source runs when a module is imported for the first time."""
    path = _file_of(module)
    if path is None:
        return ()
    parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
    with _parsing:
        body = ast.parse(path.read_bytes()).body
    named = [name for node in _import_nodes(body) for name in _names(node, parent)]
    found = [name for name in (module, *named) if name.partition(".")[0] == PACKAGE]
    packages = [name[:i] for name in found for i, letter in enumerate(name) if letter == "."]
    return tuple(name for name in dict.fromkeys((*found, *packages)) if name != module and _file_of(name) is not None)


def _import_nodes(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run with the module: not those of functions, nor those for type checkers alone."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _import_nodes(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from _import_nodes(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _import_nodes(handler.body)


def _names(node: ast.Import | ast.ImportFrom, parent: str) -> Iterator[str]:
    """What a statement may import; what it takes from a module may be a module too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    above = parent.split(".")[: len(parent.split(".")) - node.level + 1] if node.level else []
    module = ".".join((*above, node.module) if node.module else above)
    yield module
    yield from (f"{module}.{alias.name}" for alias in node.names)


def _file_of(module: str) -> Path | None:
    """The source file; None where there is none, or the name is no module's."""
    top, _, rest = module.partition(".")
    if top == PACKAGE:
        path = ROOT.joinpath(*rest.split(".")) if rest else ROOT
        found = (path / "__init__.py", path.with_name(path.name + ".py") if rest else path / "__init__.py")
        return next((file for file in found if file.is_file()), None)
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file and file.endswith(".py") else None
