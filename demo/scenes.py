"""Procedural scenes with captions: one to three coloured shapes on a plain background.

They are the demo model's whole world. Numpy only: no torch, no model code. Lengths are in pixels of a
256x256 image and scale with the image side; positions are fractions of the side.
"""

import zlib
from collections.abc import Collection, Iterator
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [H, W, 3]
Floats = NDArray[np.floating]

KINDS = ("circle", "square", "triangle")
COLORS = {
    "red": (225, 35, 35),
    "green": (30, 180, 60),
    "blue": (35, 75, 225),
    "yellow": (245, 215, 40),
    "purple": (170, 45, 205),
    "cyan": (35, 205, 225),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (12, 12, 12), "gray": (128, 128, 128)}
SIZES = {"small": 30.0, "large": 50.0}  # radius in pixels at 256
PATTERNS = ("plain", "striped", "checked")
RELATIONS = ("alone", "left of", "above")

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
PLACEMENTS = {**CELLS, **ROW, **COLUMN}  # name -> (x, y) centre

BASE_SIDE = 256
STRIPE_WIDTH = 8  # pixels at 256; two stripes make the period, which equals the tokenizer's 16x16 patch
DARKENED = 0.45  # brightness of a pattern's second colour
SQUARE_HALF_SIDE = 0.9  # in radii: keeps the visual weight of the three kinds similar
MAX_SHIFT = 5.0  # pixels at 256
MAX_SCALING = 0.05
COUNT_PROBABILITIES = (0.45, 0.38, 0.17)  # of one, two and three shapes
HELD_OUT_ONE_IN = 20

# (relation, number of shapes) -> placements in reading order; a lone shape may take any cell
LAYOUTS = {
    ("left of", 2): ("left", "right"),
    ("above", 2): ("top", "bottom"),
    ("left of", 3): tuple(ROW),
    ("above", 3): tuple(COLUMN),
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
}
SERIES_PHRASES = {"left of": "in a row from left to right", "above": "in a column from top to bottom"}


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

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) as fractions of the image side, without jitter."""
        return PLACEMENTS[self.cell]


@dataclass(frozen=True)
class Scene:
    """A background and one to three shapes in reading order (left to right or top to bottom)."""

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


def _check(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"got {name} {value!r}; expected one of {', '.join(allowed)}")


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene; about 45 % have one shape, 38 % two and 17 % three."""
    count = 1 + int(np.searchsorted(np.cumsum(COUNT_PROBABILITIES)[:-1], rng.random(), side="right"))
    relation = "alone" if count == 1 else _pick(RELATIONS[1:], rng)
    cells = (_pick(tuple(CELLS), rng),) if count == 1 else LAYOUTS[relation, count]
    identities = rng.choice(len(COLORS) * len(KINDS), size=count, replace=False)
    shapes = tuple(
        Shape(
            kind=KINDS[identity % len(KINDS)],
            color=tuple(COLORS)[identity // len(KINDS)],
            size="small" if count == 3 else _pick(tuple(SIZES), rng),
            pattern=_pick(PATTERNS, rng),
            cell=cell,
        )
        for identity, cell in zip(identities, cells, strict=True)
    )
    return Scene(_pick(tuple(BACKGROUNDS), rng), shapes, relation)


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def is_held_out(scene: Scene) -> bool:
    """True for the fixed one in twenty scenes that are never trained on; stable across processes."""
    return zlib.crc32(repr(astuple(scene)).encode()) % HELD_OUT_ONE_IN == 0


def training_scenes(seed: int) -> Iterator[Scene]:
    """Endless scenes without the held-out ones."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng)
        if not is_held_out(scene):
            yield scene


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """`count` different held-out scenes."""
    rng = np.random.default_rng(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scene = sample_scene(rng)
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
    words = ("a", shape.size if with_size else "", "" if shape.pattern == "plain" else shape.pattern)
    return " ".join(word for word in (*words, shape.color, shape.kind) if word)


def render(scene: Scene, size: int = BASE_SIDE, rng: np.random.Generator | None = None) -> Pixels:
    """Draw the scene anti-aliased; with `rng`, shapes move by up to 5 px and scale by up to 5 %.

    Returns uint8 [size, size, 3]. Patterns are locked to the image grid, not to the shape, so that
    every 16x16 patch (at 256) inside a patterned shape looks alike.
    """
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    unit = size / BASE_SIDE
    for shape in scene.shapes:
        jitter = np.zeros(3) if rng is None else rng.uniform(-1, 1, 3)
        x, y = np.asarray(shape.centre) * size + jitter[:2] * MAX_SHIFT * unit
        _draw(image, shape, x, y, SIZES[shape.size] * unit * (1 + MAX_SCALING * jitter[2]), unit)
    return np.rint(image).astype(np.uint8)


def _draw(image: NDArray[np.float32], shape: Shape, x: float, y: float, radius: float, unit: float) -> None:
    """Blend one shape into `image` (float32 [H, W, 3], in place), touching its bounding box only."""
    left, top = max(int(x - radius) - 2, 0), max(int(y - radius) - 2, 0)
    window = image[top : int(y + radius) + 3, left : int(x + radius) + 3]
    rows = np.arange(top, top + window.shape[0], dtype=np.float32)[:, None] + 0.5
    columns = np.arange(left, left + window.shape[1], dtype=np.float32)[None, :] + 0.5
    distance = signed_distance(shape.kind, columns - np.float32(x), rows - np.float32(y), radius)
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # [h, w, 1]
    brightness = _brightness(shape.pattern, columns / unit, rows / unit)[..., None]
    color = brightness * np.asarray(COLORS[shape.color], np.float32)  # [h, w, 3]
    window += coverage * (color - window)


def signed_distance(kind: str, x: Floats, y: Floats, radius: float) -> Floats:
    """Distance to the outline, negative inside; x and y are relative to the centre and broadcast."""
    if kind == "circle":
        return np.asarray(np.hypot(x, y) - radius)
    if kind == "square":
        return np.asarray(np.maximum(abs(x), abs(y)) - SQUARE_HALF_SIDE * radius)
    # triangle: apex (0, -radius), base corners (+-radius, radius)
    return np.asarray(np.maximum(y - radius, (2 * abs(x) - y - radius) / np.sqrt(np.float32(5))))


def _brightness(pattern: str, x: Floats, y: Floats) -> Floats:
    """1 or `DARKENED` per pixel, float32, broadcastable to [h, w]; x, y in pixels at 256."""
    if pattern == "plain":
        return np.ones((1, 1), np.float32)
    stripe = (y // STRIPE_WIDTH).astype(np.int32)
    if pattern == "checked":
        stripe = stripe + (x // STRIPE_WIDTH).astype(np.int32)
    return np.where(stripe % 2 == 0, np.float32(1), np.float32(DARKENED))
