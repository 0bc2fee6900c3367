"""Every name of TensorRT that is used is in the stubs of TensorRT 10.13; what only TensorRT-RTX has is listed.

The stubs do not parse in places, so that no type checker reads them; names are read off by line.
"""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest

from fastvar.engines.tensorrt import backend

SOURCES = Path(backend.__file__).parent
# Of TensorRT-RTX alone, behind its own backend class or a look whether they are there.
RTX = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
RTX |= {"create_runtime_cache", "set_runtime_cache", "deserialize", "serialize"}
LIBRARY = {
    "trt",
    "builder",
    "network",
    "config",
    "parser",
    "engine",
    "context",
    "first",
    "tensor",
}  # what holds objects


@pytest.fixture(scope="module")
def stubs() -> str:
    try:
        files = metadata.files("tensorrt-stubs") or []
    except metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed")
    (found,) = (file for file in files if file.name == "tensorrt.pyi")
    return Path(str(found.locate())).read_text(encoding="utf-8")


def names(stubs: str) -> set[str]:
    found = re.findall(r"^\s*(?:class|def)\s+(\w+)|^\s*(\w+)\s*:", stubs, re.MULTILINE)
    return {name for pair in found for name in pair}


def used() -> set[str]:
    """Attributes of objects of the library, by the names that they are held under."""
    found = set()
    for file in ("backend.py", "runtime.py", "build_log.py"):
        for node in ast.walk(ast.parse((SOURCES / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                holder = node.value
                while isinstance(holder, ast.Attribute):
                    holder = holder.value
                text = ast.unparse(node.value).split(".")[-1].lstrip("_")
                if (isinstance(holder, ast.Name) and holder.id in LIBRARY) or text in LIBRARY:
                    found.add(node.attr)
    return found


def test_names_are_those_of_the_library(stubs: str):
    asked = used()
    assert {"create_network", "build_serialized_network", "execute_async_v3", "device_memory_size_v2"} <= asked
    assert asked - names(stubs) - RTX == set()


def test_names_of_the_other_library_are_used():
    assert RTX - {"deserialize", "serialize"} <= used()
