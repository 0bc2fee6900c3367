"""Bundles that lie in ComfyUI's folders, by name, and the pipelines that are loaded of them. Knows no ComfyUI."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

from fastvar import Pipeline
from fastvar.errors import DeviceMemoryError, InputError

MANIFEST = "manifest.json"
NO_BUNDLE = "(no bundle in models/fastvar)"
# Of the process, not of a workflow: where engines share one pool of threads, the first that draws decides its size.
THREADS = "FASTVAR_THREADS"
# ComfyUI keeps what a node gave as long as a workflow may want it again. A pipeline lives as long, so that "unload
# models" and another bundle free its memory.
_loaded: WeakValueDictionary[tuple[Path, int, str], Pipeline] = WeakValueDictionary()


def bundles(folders: Sequence[str]) -> dict[str, Path]:
    """Bundles that lie in these folders, by name."""
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
            found.setdefault(manifest.parent.name, manifest.parent)
    return found


def bundle_named(name: str, folders: Sequence[str]) -> Path:
    """The folder of a bundle.

    Raises:
        InputError: there is none of that name.
    """
    known = bundles(folders)
    if name not in known:
        where = folders[0] if folders else "models/fastvar"
        raise InputError(
            "there is no bundle yet" if name == NO_BUNDLE else f"no bundle is named {name!r}",
            expected=", ".join(known) or f"a folder made by `fastvar build` in {where}",
            fix="choose one of them" if known else "put one there, and press R to read the list anew",
        )
    return known[name]


def version(path: Path) -> int:
    """When a bundle's manifest was written, in ns: a bundle that was built anew is another one."""
    return (path / MANIFEST).stat().st_mtime_ns


def load(name: str, folders: Sequence[str], memory: str = "", make_room: Callable[[], None] = lambda: None) -> Pipeline:
    """The pipeline of a bundle; the same one, while somebody holds it.

    Args:
        memory: "15GiB" say; empty for no budget.
        make_room: called where the device has too little free memory. Then loading is tried once more.

    Raises:
        FastvarError: it cannot be loaded.
    """
    path = bundle_named(name, folders)
    memory = memory.strip()
    key = (path, version(path), memory)
    if (found := _loaded.get(key)) is not None:
        return found
    gc.collect()  # what nobody holds any more gives its memory back before more is asked for
    options = {"threads": threads(), "memory_budget": memory or None}
    try:
        pipe = Pipeline.load(path, **options)
    except DeviceMemoryError:
        make_room()
        pipe = Pipeline.load(path, **options)
    _loaded[key] = pipe
    return pipe


def threads() -> int | None:
    """CPU threads that the process was started with; None is the library's choice.

    Raises:
        InputError: the variable holds no number.
    """
    text = os.environ.get(THREADS, "").strip()
    if text and not text.isdecimal():
        raise InputError(f"{THREADS} is {text!r}", expected="a number of CPU threads", fix="start ComfyUI without it")
    return int(text) if text else None


def described(pipe: Pipeline) -> str:
    """A bundle in a few words: what it draws, of what, and what it can do with images."""
    manifest = pipe.manifest
    height, width = pipe.size
    subjects = "class labels" if draws_classes(pipe) else "prompts"
    edits = "enlarges and in-paints" if manifest.encoder else "no image encoder: it neither enlarges nor in-paints"
    return f"{manifest.family}: {width}x{height} of {subjects}, {len(manifest.plan.steps)} scales; {edits}"


def draws_classes(pipe: Pipeline) -> bool:
    """Whether images are drawn of class labels rather than prompts."""
    return bool(pipe.manifest.transformer.classes)
