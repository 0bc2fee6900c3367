"""The architecture: a module imports from its own folder and from folders below it, never upwards and never round."""

from __future__ import annotations

import ast
import shutil
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The folders of the package from the ground up; a file at the root is a folder of one. Those of one line do not know
# each other. This is the only place that says the order.
ORDER = (
    ("errors",),
    ("core",),
    ("core.processes",),
    ("families",),
    ("engines",),
    ("engines.cache",),
    ("hub",),
    ("engines.bundle",),
    ("engines.aotinductor", "engines.onnxruntime", "engines.tensorrt"),
    ("doctor",),
    ("runtime.images", "runtime.memory"),
    ("runtime.editing",),
    ("runtime.requests",),
    ("runtime",),
    ("export.models.common",),
    ("export.models.transformer",),
    ("export.models.codebook", "export.models.infinity"),
    ("export.models.hart", "export.models.var"),
    ("export.models",),
    ("export.checkpoints", "export.tracing"),
    ("export.conversion",),
    ("export",),
    ("profiling.estimates",),
    ("profiling",),
    ("profiling.report",),
    ("profiling.tuning",),
    ("bulk", "serving.wire"),
    ("serving",),
    ("ray_serve",),
    ("console",),
    ("commands", "commands.drawing"),
    ("cli",),
    ("__init__",),
    ("__main__",),
)
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
# Beside the order: who builds engines knows nothing of who runs them.
APART = (("export", "runtime"),)
OUTSIDE = {".venv", ".venv-cuda", ".venv-gpu", ".venv-lowest", "benchmarks", "build", "demo", "dist", "docs"}
OUTSIDE |= {".venv-ray", "integrations", "tests"}
MOST_FILES = 14  # of a folder, without its `__init__`
Imports = dict[str, dict[str, int]]  # module -> what it imports, and the line


def modules(root: Path) -> dict[str, Path]:
    """Name within the package -> file; a folder goes by its `__init__`."""
    files = (path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in OUTSIDE)
    return {_name(path.relative_to(root)): path for path in files}


def _name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def folder_of(module: str, known: dict[str, Path]) -> str:
    if known[module].name == "__init__.py":
        return module
    return module.rpartition(".")[0] or module


def imports(root: Path) -> Imports:
    """What each module imports of the package, in functions too; not what is there for type checkers alone."""
    known, found = modules(root), {}
    for module, path in known.items():
        package = list(path.relative_to(root).parent.parts)
        found[module] = {
            target: node.lineno
            for node in _import_nodes(ast.parse(path.read_bytes()))
            for target in _targets(node, package, known)
        }
    return found


def _import_nodes(node: ast.AST) -> Iterator[ast.ImportFrom | ast.Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom | ast.Import):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _import_nodes(other)
        else:
            yield from _import_nodes(child)


def _targets(node: ast.ImportFrom | ast.Import, package: list[str], known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        absolute = [alias.name for alias in node.names if alias.name.partition(".")[0] == "fastvar"]
        assert not absolute, f"imports inside the package are relative: {absolute}"
        return
    if node.level == 0:
        assert str(node.module).partition(".")[0] != "fastvar", "imports inside the package are relative"
        return
    base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
    for alias in node.names:
        submodule = ".".join([*base, alias.name])
        yield submodule if submodule in known else ".".join(base) or "__init__"


def faults(root: Path) -> list[str]:
    """Every import that points upwards or round, with its line."""
    known, found = modules(root), imports(root)
    wrong = [
        f"{known[module].relative_to(root)}:{line} imports {target}"
        for module, targets in found.items()
        for target, line in targets.items()
        if not _allowed(folder_of(module, known), folder_of(target, known))
    ]
    try:
        TopologicalSorter({module: set(targets) for module, targets in found.items()}).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' -> '.join(error.args[1])}")
    return wrong


def _allowed(importing: str, imported: str) -> bool:
    tops = importing.partition(".")[0], imported.partition(".")[0]
    return importing == imported or (LEVEL[imported] < LEVEL[importing] and tops not in APART)


def test_imports_point_down_and_never_round():
    assert faults(ROOT) == []


def test_the_order_names_every_folder_and_no_other():
    known = modules(ROOT)
    assert {folder_of(module, known) for module in known} == set(LEVEL)


ADDED = {  # file, line added to it, what it wrongly imports
    "upwards": ("core/plan.py", "from ..families import family_named", "families"),
    "its own parent folder": ("runtime/memory/layout.py", "from ..session import Session", "runtime.session"),
    "a neighbour": ("engines/tensorrt/backend.py", "from ..onnxruntime import needs", "engines.onnxruntime.needs"),
    "who runs engines": ("export/build.py", "from ..runtime import pipeline", "runtime.pipeline"),
    "in a function": ("engines/base.py", "def late():\n    from .bundle import bundle", "engines.bundle.bundle"),
}


@pytest.mark.parametrize("added", ADDED)
def test_one_import_that_points_upwards_is_found(copy: Path, added: str):
    file, line, target = ADDED[added]
    assert faults(copy) == []
    changed = copy / file
    changed.write_text(f"{changed.read_text()}\n{line}\n")
    last = len(changed.read_text().splitlines())
    assert f"{file}:{last} imports {target}" in faults(copy)


def test_one_import_that_goes_round_is_found(copy: Path):
    changed = copy / "core" / "schedule.py"
    changed.write_text(f"{changed.read_text()}\nfrom .plan import make_plan\n")
    (fault,) = faults(copy)
    assert fault.startswith("a circle: ")
    assert {"core.schedule", "core.plan"} <= set(fault.removeprefix("a circle: ").split(" -> "))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's sources, to be changed."""
    for path in modules(ROOT).values():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def test_no_folder_is_a_drawer():
    """Files of one folder are to be seen at one glance."""
    known = modules(ROOT)
    counts = Counter(folder_of(module, known) for module, path in known.items() if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}
