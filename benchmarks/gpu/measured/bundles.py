"""Section "build": every bundle of the day, side by side, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.recipes import Recipe, recipes
from benchmarks.gpu.sections import BUNDLES, Context
from fastvar.core.platform import usable_cores
from fastvar.engines.bundle.folder import MANIFEST
from fastvar.profiling.memory_run import run_apart

MOST_AT_ONCE = 8


def measure(context: Context) -> None:
    """A line for the machine, and one for each bundle."""
    from fastvar.doctor import examine

    context.log.measure("machine", lambda: {**gpu_facts(), **examine()})
    folder = context.work / BUNDLES
    folder.mkdir(parents=True, exist_ok=True)
    build_all(context, list(recipes(context.identity.model, context.identity.capability)), folder)


def build_all(context: Context, wanted: Sequence[Recipe], folder: Path) -> None:
    """All recipes; one that takes over weights begins when these are there. Those first in the list begin first."""
    cores = usable_cores()
    at_once = max(1, min(MOST_AT_ONCE, cores // 2))
    jobs = min(cores, 2 * cores // at_once)  # each; where all compile at once, twice as many as there are cores

    def build(recipe: Recipe) -> None:
        context.log.measure(
            recipe.name,
            lambda: run_apart(f"built {recipe.name}", make, recipe, folder, jobs),
            stands=(folder / recipe.name / MANIFEST).is_file,
        )

    with ThreadPoolExecutor(at_once) as pool:
        first = {recipe.name: pool.submit(build, recipe) for recipe in wanted if not recipe.like}
        for name in dict.fromkeys(recipe.like for recipe in wanted if recipe.like):
            first[name].result()
            for recipe in wanted:
                if recipe.like == name:
                    pool.submit(build, recipe)


def make(recipe: Recipe, folder: Path, jobs: int) -> dict[str, Any]:
    """What another process runs."""
    return recipe.make(folder, jobs)


def gpu_facts() -> dict[str, Any]:
    """What torch says of the GPU; in a process of its own, for it takes memory of it."""
    return run_apart("asked torch for its GPU", _device_facts)


def _device_facts() -> dict[str, Any]:
    from benchmarks.eager import device_facts

    return device_facts("cuda")
