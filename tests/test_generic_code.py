"""Generic code names no family: what differs between families it asks of `Family` and `ModelAdapter`.

So a new family is its own files and its lines in the two registries, and nothing else has to be looked through.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from fastvar.families import FAMILIES

ROOT = Path(__file__).parents[1]
OWN = {*FAMILIES, "codebook"}  # folders of export/models, and modules of families/, that know families
REGISTRIES = {"families/__init__.py", "export/models/registry.py"}
NAME = re.compile(rf"(?i)(?<![a-z])({'|'.join(FAMILIES)})(?![a-z])")


def generic_files() -> Iterator[Path]:
    for folder in ("core", "engines", "runtime", "export", "profiling", "console", "commands", "families"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            owned = parts[0] in ("export", "families") and any(part.split("_")[0] in OWN for part in parts)
            if not owned and path.relative_to(ROOT).as_posix() not in REGISTRIES:
                yield path


def named_families(source: str) -> list[str]:
    """Families in imports and in texts that are no docstrings, with their lines."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and NAME.search(node.module or ""):
            found.append(f"{node.lineno} imports {node.module}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value.replace("NaN or infinity", "").replace("NaN and infinity", "")  # the number
            found += [f"{node.lineno} says {name.lower()}" for name in NAME.findall(text)]
    return found


def test_no_family_is_named():
    found = {path.relative_to(ROOT).as_posix(): named_families(path.read_text("utf-8")) for path in generic_files()}
    assert len(found) > 150
    assert {file: names for file, names in found.items() if names} == {}


def test_a_family_that_is_named_is_found():
    assert named_families('"""VAR in a docstring."""\nfrom ..families.var import VAR\n') == ["2 imports families.var"]
    assert named_families('raise ValueError("upscaling is Infinity\'s")\n') == ["1 says infinity"]
    assert named_families('raise ValueError("holds NaN or infinity; a chart of variables")\n') == []
