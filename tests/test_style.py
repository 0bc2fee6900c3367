"""What keeps the tree readable: no long file, no long function, no full folder, no ignore without its reason."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_imports import ROOT, modules

OURS = ("benchmarks", "demo", "tests")  # beside the package
MOST_LINES = 400  # of a file
MOST_LINES_OF_FUNCTION = 60
MOST_TEST_FILES = 15  # of a folder, without `__init__` and `conftest`; the package's own folders: test_imports.py
OPTION_LISTS = "commands"  # the signature of a command is the list of its options: its body alone counts
IGNORE = re.compile(r"#\s*type:\s*ignore(?P<code>\[[\w, -]+\])?(?P<rest>.*)")
REASON = re.compile(r"\s+# \w.*\w")


def sources() -> list[Path]:
    """Every Python file of the package and beside it."""
    return [*modules(ROOT).values(), *(path for folder in OURS for path in sorted((ROOT / folder).rglob("*.py")))]


def long_functions(file: Path, body_only: bool) -> Iterator[str]:
    """Functions with more lines than a screen, methods and nested ones among them."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0].lineno if body_only else node.lineno
            assert node.end_lineno is not None
            if (lines := node.end_lineno - first + 1) > MOST_LINES_OF_FUNCTION:
                yield f"{file}:{node.lineno} {node.name} has {lines} lines"


def ignores_without_reason(file: Path) -> Iterator[str]:
    """`type: ignore` that names no error, or does not say why beside it."""
    with file.open("rb") as lines:
        for token in tokenize.tokenize(lines.readline):
            found = IGNORE.match(token.string) if token.type == tokenize.COMMENT else None
            if found and not (found["code"] and REASON.fullmatch(found["rest"])):
                yield f"{file}:{token.start[0]} {token.string}"


def test_no_file_is_long():
    counts = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {str(path): count for path, count in counts.items() if count > MOST_LINES} == {}


def test_no_function_of_the_package_is_long():
    found = [
        fault
        for module, path in modules(ROOT).items()
        for fault in long_functions(path, body_only=module.startswith(OPTION_LISTS))
    ]
    assert found == []


def test_no_folder_of_tests_is_a_drawer():
    files = (path for path in (ROOT / "tests").rglob("*.py") if path.name not in ("__init__.py", "conftest.py"))
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in files)
    assert {folder: count for folder, count in counts.items() if count > MOST_TEST_FILES} == {}


def test_every_ignore_has_its_reason():
    assert [fault for path in sources() for fault in ignores_without_reason(path)] == []


@pytest.mark.parametrize(
    ("comment", "fine"),
    [
        ("# type: ignore[attr-defined]  # every family's have some", True),
        ("# type: ignore[attr-defined]", False),
        ("# type: ignore[attr-defined]  #", False),
        ("# type: ignore  # whatever it is", False),
        ("#type:ignore", False),
        ("# says why", True),
    ],
)
def test_an_ignore_without_a_reason_is_found(tmp_path: Path, comment: str, fine: bool):
    file = tmp_path / "module.py"
    file.write_text(f'text = "# type: ignore"\nx = 1  {comment}\n')
    assert len(list(ignores_without_reason(file))) == (0 if fine else 1)


def test_a_long_function_is_found(tmp_path: Path):
    file = tmp_path / "module.py"
    options = "".join(f"    option_{i}: int,\n" for i in range(MOST_LINES_OF_FUNCTION))
    statements = "".join(f"    x = {i}\n" for i in range(MOST_LINES_OF_FUNCTION))
    file.write_text(f"def short(\n{options}) -> None:\n{statements}")
    assert list(long_functions(file, body_only=True)) == []
    assert len(list(long_functions(file, body_only=False))) == 1
    file.write_text(f"class Some:\n    def long(self) -> None:\n{statements.replace('    x', '        x')}")
    assert [fault.partition(" ")[2] for fault in long_functions(file, body_only=False)] == ["long has 61 lines"]
