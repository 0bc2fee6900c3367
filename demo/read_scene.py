"""Read a scene back from pixels by plain geometry: no learned part, so it can judge a generated image.

It works on a 128x128 reduction of the image, which takes out noise and keeps the 8-pixel stripes, and it
tolerates blur, colour shifts and ringing. It knows the palette and the kinds, never the caption.
"""

from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np
from numpy.typing import NDArray

from demo.scenes import (
    BACKGROUNDS,
    BASE_SIDE,
    CELLS,
    COLORS,
    KINDS,
    SIZES,
    SQUARE_HALF_SIDE,
    STRIPE_WIDTH,
    Pixels,
    Scene,
    Shape,
    signed_distance,
)

Colors = NDArray[np.float32]
Mask = NDArray[np.bool_]  # [GRID, GRID]

ATTRIBUTES = ("background", "count", "color", "shape", "size", "pattern", "position", "relation")
_SHAPE_FIELDS = {"color": "color", "shape": "kind", "size": "size", "pattern": "pattern"}

GRID = 128  # side of the reduced image; all thresholds below are in its pixels
COLORED = 38.0  # chroma difference from the background that makes a pixel foreground
MIN_AREA = 120  # the smallest clean shape, a small triangle, covers about 400
MAX_SHAPES = 5  # the largest are kept: a bound on the cost of matching a broken image
PATTERN_CONTRAST = 0.1  # amplitude of the 16-pixel wave over mean brightness: 0 on plain, 0.15 or more else
MIN_STEP = 0.12  # fraction of the side between two shapes that stand in a relation


@dataclass(frozen=True)
class SeenShape:
    """One shape found in an image; `centre` is (x, y) in fractions of the side."""

    kind: str
    color: str
    size: str
    pattern: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """What an image shows; shapes are sorted from the largest area to the smallest."""

    background: str
    shapes: tuple[SeenShape, ...]


def read_scene(image: Pixels) -> Reading:
    """Read uint8 [S, S, 3], S a multiple of 128; raises ValueError for another shape."""
    pixels = _reduce(image)  # [GRID, GRID, 3]
    background = _background(pixels)  # [3]
    difference = pixels - background
    mask = _smooth(difference.max(2) - difference.min(2)) > COLORED
    regions = sorted(_regions(mask), key=np.sum, reverse=True)[:MAX_SHAPES]
    levels = {name: np.mean(color) for name, color in BACKGROUNDS.items()}
    nearest = min(levels, key=lambda name: abs(levels[name] - background.mean()))
    return Reading(nearest, tuple(_read_shape(pixels, region) for region in regions))


def _reduce(image: Pixels) -> Colors:
    """Average blocks: uint8 [S, S, 3] -> float32 [GRID, GRID, 3]."""
    side = image.shape[0]
    if image.shape != (side, side, 3) or side % GRID or image.dtype != np.uint8:
        raise ValueError(f"got {image.dtype} {image.shape}; expected uint8 [S, S, 3], S a multiple of {GRID}")
    block = side // GRID
    return np.asarray(image.reshape(GRID, block, GRID, block, 3).mean((1, 3), dtype=np.float32))


def _background(pixels: Colors) -> Colors:
    """Median colour of a 3-pixel frame, which no shape reaches: float32 [3]."""
    frame = np.ones((GRID, GRID), bool)
    frame[3:-3, 3:-3] = False
    return np.asarray(np.median(pixels[frame], axis=0))


def _smooth(values: Colors) -> Colors:
    """3x3 mean with replicated borders, [H, W]."""
    for axis in (0, 1):
        padded = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        parts = [np.take(padded, np.arange(GRID) + shift, axis) for shift in (0, 1, 2)]
        values = np.add.reduce(parts) / np.float32(3)
    return values


def _regions(mask: Mask) -> list[Mask]:
    """4-connected components of at least `MIN_AREA`, as bool [GRID, GRID] masks."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.pad(labels, 1)
        neighbours = (spread[:-2, 1:-1], spread[2:, 1:-1], spread[1:-1, :-2], spread[1:-1, 2:], labels)
        spread = np.where(mask, np.maximum.reduce(neighbours), 0)
        if (spread == labels).all():
            break
        labels = spread
    names, areas = np.unique(labels[mask], return_counts=True)
    return [labels == name for name, area in zip(names, areas, strict=True) if area >= MIN_AREA]


def _read_shape(pixels: Colors, region: Mask) -> SeenShape:
    core = _smooth(region.astype(np.float32)) > 0.99  # away from the blended outline
    kind, radius, centre = _fit(region)
    inside = core if core.any() else region
    return SeenShape(kind, _color(pixels[inside]), _size(radius), _pattern(pixels, inside), centre)


def _fit(region: Mask) -> tuple[str, float, tuple[float, float]]:
    """The kind whose ideal outline of equal area and centroid overlaps best: kind, radius, centre.

    Area and centroid, unlike a bounding box, hardly move when a few outline pixels are wrong.
    """
    rows, columns = np.nonzero(region)
    area, y, x = len(rows), rows.mean(), columns.mean()
    grid = np.arange(GRID, dtype=np.float32)
    fits = []
    for kind in KINDS:
        unit_area = {"circle": np.pi, "square": (2 * SQUARE_HALF_SIDE) ** 2, "triangle": 2.0}[kind]
        radius = float(np.sqrt(area / unit_area))
        centre_y = y - radius / 3 if kind == "triangle" else y  # a triangle's centroid lies below its middle
        ideal = signed_distance(kind, grid[None, :] - x, grid[:, None] - centre_y, radius) < 0
        overlap = (ideal & region).sum() / (ideal | region).sum()
        fits.append((overlap, kind, radius, ((x + 0.5) / GRID, (centre_y + 0.5) / GRID)))
    return max(fits)[1:]


def _color(values: Colors) -> str:
    """Nearest palette hue of float32 [N, 3]; brightness cancels out, so patterns do not matter."""

    def hue(color: Colors) -> Colors:
        chroma = color - color.min()
        return np.asarray(chroma / max(np.linalg.norm(chroma), 1e-6))

    mean = hue(values.mean(0))
    return max(COLORS, key=lambda name: float(mean @ hue(np.asarray(COLORS[name], np.float32))))


def _size(radius: float) -> str:
    return min(SIZES, key=lambda name: abs(SIZES[name] * GRID / BASE_SIDE - radius))


def _pattern(pixels: Colors, region: Mask) -> str:
    """Compare the amplitudes of horizontal stripes and of a checkerboard, whatever their phase."""
    rows, columns = np.nonzero(region)
    light = pixels[rows, columns].max(1)  # [N]
    contrast = light / light.mean() - 1
    wave = np.pi / (STRIPE_WIDTH * GRID / BASE_SIDE)  # radians per pixel
    striped = _amplitude(contrast, wave * rows)
    diagonals = (_amplitude(contrast, wave * (rows + sign * columns)) for sign in (1, -1))
    checked = sum(diagonals)
    if max(striped, checked) < PATTERN_CONTRAST:
        return "plain"
    return "striped" if striped > checked else "checked"


def _amplitude(values: Colors, phase: NDArray[np.floating]) -> float:
    return float(abs(np.mean(values * np.exp(1j * phase))))


def score(reading: Reading, scene: Scene) -> dict[str, tuple[int, int]]:
    """Attribute -> (correct, total) for every name in `ATTRIBUTES`.

    color, shape (the kind), size and pattern count each expected shape; position counts the cell of a lone
    shape, relation the neighbouring pairs of two or three shapes (so one of the two has a total of 0). A
    shape that was not found counts as wrong; surplus shapes show in `count` only.
    """
    pairs = _match(reading.shapes, scene.shapes)
    result = {
        "background": (int(reading.background == scene.background), 1),
        "count": (int(len(reading.shapes) == len(scene.shapes)), 1),
    }
    for name, field in _SHAPE_FIELDS.items():
        hits = sum(seen is not None and getattr(seen, field) == getattr(want, field) for seen, want in pairs)
        result[name] = (hits, len(pairs))
    result["position"] = (_in_cell(*pairs[0]), 1) if scene.relation == "alone" else (0, 0)
    steps = list(pairwise(pairs))
    ordered = sum(_in_order(first[0], second[0], scene.relation) for first, second in steps)
    result["relation"] = (ordered, len(steps))
    return result


def _match(seen: tuple[SeenShape, ...], wanted: tuple[Shape, ...]) -> list[tuple[SeenShape | None, Shape]]:
    """Pair every wanted shape with at most one seen shape so that most attributes agree."""
    candidates = permutations((*seen, *([None] * len(wanted))), len(wanted))
    return max(
        ([*zip(chosen, wanted, strict=True)] for chosen in candidates),
        key=lambda pairs: sum(_agreement(*pair) for pair in pairs),
    )


def _agreement(seen: SeenShape | None, want: Shape) -> float:
    """Agreeing attributes; closeness only breaks ties, so that a wrong relation is not matched away."""
    if seen is None:
        return 0.0
    same = sum(bool(getattr(seen, name) == getattr(want, name)) for name in _SHAPE_FIELDS.values())
    return 0.5 + same - 0.1 * float(np.hypot(*np.subtract(seen.centre, want.centre)))


def _in_cell(seen: SeenShape | None, want: Shape) -> int:
    if seen is None:
        return 0
    nearest = min(CELLS, key=lambda cell: float(np.hypot(*np.subtract(seen.centre, CELLS[cell]))))
    return int(nearest == want.cell)


def _in_order(first: SeenShape | None, second: SeenShape | None, relation: str) -> int:
    """1 if `second` lies to the right of (below) `first` by a clear and mainly horizontal (vertical) step."""
    if first is None or second is None:
        return 0
    along, across = np.subtract(second.centre, first.centre)[:: 1 if relation == "left of" else -1]
    return int(along > MIN_STEP and along > abs(across))
