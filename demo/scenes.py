"""Procedural scenes with captions: one to three coloured shapes on a background.

A `World` says which kinds, patterns, backgrounds and relations there are; it is a demo model's whole world. Numpy
only: no torch, no model code, no pixels. Lengths are in pixels of a 256x256 image; positions are fractions of the side.
"""

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np

KINDS = ("circle", "square", "triangle", "star", "ring", "hexagon")
COLORS = {
    "red": (225, 35, 35),
    "green": (30, 180, 60),
    "blue": (35, 75, 225),
    "yellow": (245, 215, 40),
    "purple": (170, 45, 205),
    "cyan": (35, 205, 225),
}
LEVELS = {"white": 245, "black": 12, "gray": 128}  # of the three equal channels of a background
STYLES = ("", "gradient ", "dotted ")
BACKGROUNDS = tuple(style + level for style in STYLES for level in LEVELS)
SIZES = {"small": 30.0, "large": 50.0}  # radius in pixels at 256
PATTERNS = ("plain", "striped", "checked", "outlined")
RELATIONS = ("alone", "left of", "above", "in front of")

CELLS = {
    "centre": (1 / 2, 1 / 2),
    "left": (1 / 4, 1 / 2),
    "right": (3 / 4, 1 / 2),
    "top": (1 / 2, 1 / 4),
    "bottom": (1 / 2, 3 / 4),
    "top left": (1 / 4, 1 / 4),
    "top right": (3 / 4, 1 / 4),
    "bottom left": (1 / 4, 3 / 4),
    "bottom right": (3 / 4, 3 / 4),
}
ROW = {"row first": (1 / 6, 1 / 2), "row middle": (1 / 2, 1 / 2), "row last": (5 / 6, 1 / 2)}
COLUMN = {"column first": (1 / 2, 1 / 6), "column middle": (1 / 2, 1 / 2), "column last": (1 / 2, 5 / 6)}
OVERLAP = {"front": (0.42, 0.56), "behind": (0.58, 0.44)}  # 51 pixels apart at 256
PLACEMENTS = {**CELLS, **ROW, **COLUMN, **OVERLAP}  # name -> (x, y) centre

COUNT_PROBABILITIES = (0.45, 0.38, 0.17)  # of one, two and three shapes
HELD_OUT_ONE_IN = 20

# (relation, number of shapes) -> placements in reading order; a lone shape may take any cell
LAYOUTS = {
    ("left of", 2): ("left", "right"),
    ("above", 2): ("top", "bottom"),
    ("left of", 3): tuple(ROW),
    ("above", 3): tuple(COLUMN),
    ("in front of", 2): tuple(OVERLAP),
}

CELL_PHRASES = {
    "centre": "in the centre",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    **{cell: f"in the {cell} corner" for cell in CELLS if " " in cell},
}
# relation -> (phrases for reading order, phrases for the reverse order)
RELATION_PHRASES = {
    "left of": ((" left of ", " to the left of "), (" right of ", " to the right of ")),
    "above": ((" above ",), (" below ",)),
    "in front of": ((" in front of ",), (" behind ",)),
}
SERIES_PHRASES = {"left of": "in a row from left to right", "above": "in a column from top to bottom"}


@dataclass(frozen=True)
class World:
    """What scenes are made of. Relations: "alone", then those of several shapes."""

    kinds: tuple[str, ...]
    patterns: tuple[str, ...]
    backgrounds: tuple[str, ...]
    relations: tuple[str, ...]


SIMPLE = World(KINDS[:3], PATTERNS[:3], BACKGROUNDS[:3], RELATIONS[:3])
RICH = World(KINDS, PATTERNS, BACKGROUNDS, RELATIONS)
SHIPPED = SIMPLE  # the world that the model in demo/checkpoint was trained on


@dataclass(frozen=True)
class Shape:
    """One shape; `cell` is a key of `PLACEMENTS`."""

    kind: str
    color: str
    size: str
    pattern: str
    cell: str

    def __post_init__(self) -> None:
        _check("kind", self.kind, KINDS)
        _check("color", self.color, COLORS)
        _check("size", self.size, SIZES)
        _check("pattern", self.pattern, PATTERNS)
        _check("cell", self.cell, PLACEMENTS)
        if self.kind == "ring" and self.pattern == "outlined":
            raise ValueError("got an outlined ring; expected a ring that is filled, or another kind")

    @property
    def solid(self) -> bool:
        """True where nothing of what lies behind shows within the outline."""
        return self.kind != "ring" and self.pattern != "outlined"

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) as fractions of the image side, without jitter."""
        return PLACEMENTS[self.cell]


@dataclass(frozen=True)
class Scene:
    """A background and one to three shapes in reading order: left to right, top to bottom, or front to back."""

    background: str
    shapes: tuple[Shape, ...]
    relation: str

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        _check("relation", self.relation, RELATIONS)
        cells = tuple(shape.cell for shape in self.shapes)
        alone = self.relation == "alone" and len(cells) == 1 and cells[0] in CELLS
        if not alone and LAYOUTS.get((self.relation, len(cells))) != cells:
            raise ValueError(f"got relation {self.relation!r} with cells {cells}; expected one of {LAYOUTS}")
        if len({(shape.color, shape.kind) for shape in self.shapes}) < len(cells):
            raise ValueError("shapes of one scene need different (color, kind) pairs")
        if self.relation == "in front of" and not self._parts_by_color():
            raise ValueError("shapes that overlap need to be large and solid, and of different colors")

    def _parts_by_color(self) -> bool:
        """True if enough is seen of both shapes, and their colors tell which part belongs to which."""
        plain = all(shape.solid and shape.size == "large" for shape in self.shapes)
        return plain and len({shape.color for shape in self.shapes}) == len(self.shapes)


def _check(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"got {name} {value!r}; expected one of {', '.join(allowed)}")


def sample_scene(rng: np.random.Generator, world: World = SHIPPED) -> Scene:
    """A random scene; about 45 % have one shape, 38 % two and 17 % three."""
    count = 1 + int(np.searchsorted(np.cumsum(COUNT_PROBABILITIES)[:-1], rng.random(), side="right"))
    several = tuple(relation for relation in world.relations if (relation, count) in LAYOUTS)
    relation = "alone" if count == 1 else _pick(several, rng)
    cells = (_pick(tuple(CELLS), rng),) if count == 1 else LAYOUTS[relation, count]
    if relation == "in front of":
        return _overlapping(cells, rng, world)
    identities = rng.choice(len(COLORS) * len(world.kinds), size=count, replace=False)
    shapes = tuple(
        _dressed(
            kind=world.kinds[identity % len(world.kinds)],
            color=tuple(COLORS)[identity // len(world.kinds)],
            size="small" if count == 3 else _pick(tuple(SIZES), rng),
            cell=cell,
            patterns=world.patterns,
            rng=rng,
        )
        for identity, cell in zip(identities, cells, strict=True)
    )
    return Scene(_pick(world.backgrounds, rng), shapes, relation)


def _overlapping(cells: tuple[str, ...], rng: np.random.Generator, world: World) -> Scene:
    """Large solid shapes of different colors, front to back."""
    patterns = tuple(pattern for pattern in world.patterns if pattern != "outlined")
    kinds = tuple(kind for kind in world.kinds if kind != "ring")
    colors = rng.choice(tuple(COLORS), size=len(cells), replace=False)
    shapes = tuple(
        _dressed(_pick(kinds, rng), str(color), "large", cell, patterns, rng)
        for color, cell in zip(colors, cells, strict=True)
    )
    return Scene(_pick(world.backgrounds, rng), shapes, "in front of")


def _dressed(kind: str, color: str, size: str, cell: str, patterns: tuple[str, ...], rng: np.random.Generator) -> Shape:
    """A shape in a random pattern that its kind can have."""
    allowed = tuple(pattern for pattern in patterns if (kind, pattern) != ("ring", "outlined"))
    return Shape(kind, color, size, _pick(allowed, rng), cell)


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def is_held_out(scene: Scene) -> bool:
    """True for the fixed one in twenty scenes that are never trained on; stable across processes."""
    return zlib.crc32(repr(astuple(scene)).encode()) % HELD_OUT_ONE_IN == 0


def training_scenes(seed: int | Sequence[int], world: World = SHIPPED) -> Iterator[Scene]:
    """Endless scenes without the held-out ones."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng, world)
        if not is_held_out(scene):
            yield scene


def held_out_scenes(count: int, seed: int, world: World = SHIPPED) -> list[Scene]:
    """`count` different held-out scenes."""
    rng = np.random.default_rng(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, world)
        if is_held_out(scene):
            scenes[scene] = None
    return list(scenes)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the natural phrasings of the scene, in lower case without a full stop."""
    names = [_name(shape, with_size=len(scene.shapes) < 3) for shape in scene.shapes]
    if scene.relation == "alone":
        content = f"{names[0]} {CELL_PHRASES[scene.shapes[0].cell]}"
    elif len(names) == 3 and rng.random() < 0.3:
        content = f"{names[0]}, {names[1]} and {names[2]} {SERIES_PHRASES[scene.relation]}"
    else:
        reverse = int(rng.integers(2))
        phrase = _pick(RELATION_PHRASES[scene.relation][reverse], rng)
        content = phrase.join(names[::-1] if reverse else names)
    if rng.random() < 0.25:
        return f"on a {scene.background} background, {content}"
    return f"{content} on a {scene.background} background"


def _name(shape: Shape, with_size: bool) -> str:
    words = (shape.size if with_size else "", "" if shape.pattern == "plain" else shape.pattern)
    name = " ".join(word for word in (*words, shape.color, shape.kind) if word)
    return f"an {name}" if name.startswith("outlined") else f"a {name}"
