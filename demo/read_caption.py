"""A caption back into the scene it describes: the inverse of `demo.scenes.caption`, so that a prompt can be scored."""

import re

from demo.scenes import (
    BACKGROUNDS,
    CELL_PHRASES,
    COLORS,
    KINDS,
    LAYOUTS,
    PATTERNS,
    RELATION_PHRASES,
    SERIES_PHRASES,
    SIZES,
    Scene,
    Shape,
)

_BACKGROUND = re.compile(
    rf"^on a ({'|'.join(BACKGROUNDS)}) background, (.*)$|^(.*) on a ({'|'.join(BACKGROUNDS)}) background$"
)
_NAME = re.compile(
    rf"an? (?:({'|'.join(SIZES)}) )?(?:({'|'.join(PATTERNS)}) )?({'|'.join(COLORS)}) ({'|'.join(KINDS)})"
)


def read_caption(text: str) -> Scene:
    """The scene; three shapes are small, as in every scene of three.

    Raises:
        ValueError: not a caption of these scenes.
    """
    found = _BACKGROUND.match(text)
    if found is None:
        raise ValueError(f"{text!r} is no caption of a scene: it names no background")
    before, behind, content, background = found.groups()
    content, background = content or behind, background or before
    names = list(_NAME.finditer(content))
    if any((name[1] is None) != (len(names) == 3) for name in names):
        raise ValueError(f"{text!r} is no caption of a scene: sizes are named where there are one or two shapes")
    joints = _NAME.sub("*", content)  # what is left of the text: where the shapes lie
    relation, cells = _placed(joints, len(names), text)
    ordered = names[::-1] if joints in _reversed(relation, len(names)) else names
    return Scene(background, tuple(_shape(name, cell) for name, cell in zip(ordered, cells, strict=True)), relation)


def _placed(joints: str, count: int, text: str) -> tuple[str, tuple[str, ...]]:
    """Relation, and cells in reading order."""
    for cell, phrase in CELL_PHRASES.items():
        if count == 1 and joints == f"* {phrase}":
            return "alone", (cell,)
    for relation, phrases in RELATION_PHRASES.items():
        forms = {phrase.join("*" * count) for direction in phrases for phrase in direction}
        series = {f"*, * and * {SERIES_PHRASES[relation]}"} if relation in SERIES_PHRASES else set()
        if (relation, count) in LAYOUTS and joints in forms | series:
            return relation, LAYOUTS[relation, count]
    raise ValueError(f"{text!r} is no caption of a scene: {joints!r} places no shapes")


def _reversed(relation: str, count: int) -> set[str]:
    """The forms that name the last shape first."""
    return {phrase.join("*" * count) for phrase in RELATION_PHRASES.get(relation, ((), ()))[1]}


def _shape(name: re.Match[str], cell: str) -> Shape:
    size, pattern, color, kind = name.groups()
    return Shape(kind, color, size or "small", pattern or "plain", cell)
