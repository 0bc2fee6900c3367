"""Mutations of a JSON document, one leaf each: what a damaged or a hostile file may say.

for mutation in mutations(document): play(mutation.applied_to(document))
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvar.engines.bundle.manifest_file import CHECKSUM, checksum
from fastvar.errors import FastvarError

Path_ = tuple[str | int, ...]
REMOVED = object()  # in place of a value: the entry goes
OTHER_TYPES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, "", "x", "1", [], {}, [[]], {"a": 1})
LARGE = (1000, 65_537, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 10**30, -(10**30))
TEXTS = (
    "{layer}", "{0}", "{layer.__class__.__mro__}", "%s", "../x", "/etc/passwd", "a\0b", "c:\\x", "\u00e9\u202e", "²",
    "a" * 5000, "manifest.json",
)  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One leaf, and what it becomes."""

    path: Path_
    value: Any

    def applied_to(self, document: Any) -> Any:
        """A copy of the document with this leaf changed."""
        changed = copy.deepcopy(document)
        place = changed
        for key in self.path[:-1]:
            place = place[key]
        if self.value is REMOVED:
            del place[self.path[-1]]
        else:
            place[self.path[-1]] = self.value
        return changed

    def __str__(self) -> str:
        value = "removed" if self.value is REMOVED else f"{self.value!r:.60}"
        return f"{'.'.join(map(str, self.path))} = {value}"


def leaves(document: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value that holds no other, with the keys that lead to it. An empty list or object is one too."""
    if isinstance(document, dict | list) and document:
        items = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in items:
            yield from leaves(value, (*path, key))
    else:
        yield path, document


def replacements(value: Any, akin: list[Any]) -> list[Any]:
    """What a leaf may become. `akin` are the values of leaves of its name elsewhere: the most plausible damage."""
    found: list[Any] = [REMOVED, *OTHER_TYPES, *LARGE, *TEXTS, [value], {"value": value}]
    if isinstance(value, int | float):
        found += [value + 1, value - 1, value * 2, -value, str(value), float(value)]
    if isinstance(value, str):
        found += [value.upper(), value + " ", value[:-1], value[::-1]]
    return [new for new in (*found, *akin) if type(new) is not type(value) or new != value]


def mutations(document: Any, *, akin: int = 3, seed: int = 0) -> Iterator[Mutation]:
    """Every mutation of every leaf, with `akin` values of its name from elsewhere; leaves in the document's order."""
    chance = random.Random(seed)
    by_name: dict[Any, list[Any]] = {}
    for path, value in leaves(document):
        known = by_name.setdefault(_name(path), [])
        if value not in known:
            known.append(value)
    for path, value in leaves(document):
        known = by_name[_name(path)]
        for new in replacements(value, chance.sample(known, min(akin, len(known)))):
            if new is not REMOVED or isinstance(path[-1], str | int):
                yield Mutation(path, new)


def sampled(document: Any, count: int, seed: int = 0) -> list[Mutation]:
    """So many mutations at random, every leaf once before any comes twice."""
    chance = random.Random(seed)
    by_leaf: dict[Path_, list[Mutation]] = {}
    for mutation in mutations(document, seed=seed):
        by_leaf.setdefault(mutation.path, []).append(mutation)
    found: list[Mutation] = []
    while len(found) < count and any(by_leaf.values()):
        for path in chance.sample(sorted(by_leaf, key=str), len(by_leaf)):
            if by_leaf[path] and len(found) < count:
                found.append(by_leaf[path].pop(chance.randrange(len(by_leaf[path]))))
    return found


def _name(path: Path_) -> Any:
    return next((key for key in reversed(path) if isinstance(key, str)), None)


ERROR, SAME, OTHER = "a FastvarError", "the same image", "another image"


def outcome(folder: Path, manifest: dict[str, Any], draw: Callable[[Path], bytes], right: bytes) -> str:
    """What becomes of a bundle with this manifest: an error of ours, the image that is right, or another one.

    Any other exception is raised: that is what mutations are for.
    """
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        return SAME if draw(folder) == right else OTHER
    except FastvarError:
        return ERROR


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the checksum that it has to have: as who changes it on purpose would write it."""
    return {**manifest, CHECKSUM: checksum(manifest)}
