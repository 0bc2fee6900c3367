"""Engines of the whole day made beforehand, on any Linux machine: what the GPU's machine need not compile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.recipes import Recipe
from fastvar.core.dtypes import human_bytes
from fastvar.engines.cache.engine_cache import EngineCache
from fastvar.errors import BuildError, FastvarError
from fastvar.profiling.memory_run import run_apart

MOST_BYTES = 60 << 20
PROGRAM_START = b"PK"  # a traced program is a zip archive; neither an engine nor an ONNX graph is


def pack(wanted: Sequence[Recipe], folder: Path, tell: Callable[[str], None] = print) -> int:
    """Put every engine of these recipes into a cache folder, and leave nothing else there; gives its bytes.

    Raises:
        BuildError: an engine cannot be made, or all together are more than fits on the way.
    """
    made = folder.with_name(f"{folder.name}.making")
    failed = []
    for recipe in wanted:
        try:
            compiled, cached = run_apart(f"compiled {recipe.name}", compile_recipe, recipe, made)
            tell(f"{recipe.name}: {compiled} compiled, {cached} there")
        except FastvarError as error:  # the others are worth having
            failed.append(recipe.name)
            tell(f"{recipe.name}: {error}")
    keep_engines(made, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    tell(f"{folder}: {len(list(folder.iterdir()))} files, {human_bytes(size)}")
    if size > MOST_BYTES:
        raise BuildError(f"the packed engines take {size} bytes", expected=f"at most {MOST_BYTES}")
    if failed:
        raise BuildError(f"not packed: {', '.join(failed)}", fix="mend what it says; what was made is kept")
    return size


def compile_recipe(recipe: Recipe, folder: Path) -> tuple[int, int]:
    """What another process runs."""
    return recipe.compile(EngineCache(folder))


def keep_engines(cache: Path, folder: Path) -> None:
    """Copy a cache without its traced programs: they are large, and needed only where one is compiled."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for entry in sorted(cache.glob("*.json")):
        digest = json.loads(entry.read_bytes())["sha256"]
        engine = cache / f"{digest}.engine"
        with engine.open("rb") as handle:
            if handle.read(len(PROGRAM_START)) == PROGRAM_START:
                continue
        shutil.copy(entry, folder)
        shutil.copy(engine, folder)
