"""Read a scene back from pixels by plain geometry: no learned part, so it can judge a generated image.

It works on a 128x128 reduction of the image, which takes out noise and keeps the 8-pixel stripes, and it tolerates
blur, colour shifts and ringing. It knows what the world is made of (demo/scenes.py), never the caption.
"""

from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np
from numpy.typing import NDArray

from demo.draw_scene import BASE_SIDE, DOT_PERIOD, STRIPE_WIDTH, Pixels
from demo.fit_shape import Fit, Mask, fit_hidden, fit_open, fit_whole, ideal, regions
from demo.scenes import CELLS, COLORS, LEVELS, SHIPPED, SIZES, STYLES, Scene, Shape, World

Colors = NDArray[np.float32]

ATTRIBUTES = ("background", "count", "color", "shape", "size", "pattern", "position", "relation")
_SHAPE_FIELDS = {"color": "color", "shape": "kind", "size": "size", "pattern": "pattern"}

GRID = 128  # side of the reduced image; all thresholds below are in its pixels
COLORED = 38.0  # chroma difference from the background that makes a pixel foreground
MIN_AREA = 120  # the smallest clean shape, an outlined small star, covers about 180
MAX_SHAPES = 5  # the largest are kept: a bound on the cost of matching a broken image
PATTERN_CONTRAST = 0.1  # amplitude of the 16-pixel wave over mean brightness: 0 on plain, 0.15 or more else
MIN_STEP = 0.12  # fraction of the side between two shapes that stand in a relation
MIN_COVERED = 12  # pixels in which two shapes overlap, where one of them hides the other
MIN_RAMP = 35.0  # levels between the top of a background and its bottom: 0 where it is even, 70 or more else
MIN_DOTS = 3.0  # amplitude of the dots' wave, in levels: 0 where there are none, 8 or more else


@dataclass(frozen=True)
class SeenShape:
    """One shape found in an image; `centre` is (x, y) in fractions of the side."""

    kind: str
    color: str
    size: str
    pattern: str
    centre: tuple[float, float]
    radius: float  # in fractions of the side
    overlap: float  # of the region and the ideal shape: 1 for a perfect outline


@dataclass(frozen=True)
class Reading:
    """What an image shows; shapes are sorted from the largest area to the smallest.

    covering: pairs of indices of shapes, the first of which hides a part of the second.
    """

    background: str
    shapes: tuple[SeenShape, ...]
    covering: frozenset[tuple[int, int]] = frozenset()


def read_scene(image: Pixels, world: World = SHIPPED) -> Reading:
    """Read uint8 [S, S, 3], S a multiple of 128; raises ValueError for another shape."""
    pixels = _reduce(image)  # [GRID, GRID, 3]
    background = _background(pixels)  # [3]
    difference = pixels - background
    mask = _smooth(difference.max(2) - difference.min(2)) > COLORED
    groups = [_parts(pixels, region, world) for region in regions(mask, MIN_AREA)]
    parts = sorted((part for group in groups for part in group), key=lambda part: part.area, reverse=True)[:MAX_SHAPES]
    return Reading(
        _style(pixels, mask, world) + _level(background),
        tuple(_read_shape(pixels, part) for part in parts),
        frozenset(
            (i, k) for i, front in enumerate(parts) for k, behind in enumerate(parts) if _hides_part(front, behind)
        ),
    )


def _level(background: Colors) -> str:
    levels = {name: abs(level - background.mean()) for name, level in LEVELS.items()}
    return min(levels, key=lambda name: float(levels[name]))


def _style(pixels: Colors, foreground: Mask, world: World) -> str:
    """What the background does beside having a level: "", or the style with a space behind it."""
    rows, columns = np.nonzero(~_widened(foreground))
    if len(rows) < GRID or all(style + next(iter(LEVELS)) not in world.backgrounds for style in STYLES[1:]):
        return STYLES[0]
    light = pixels[rows, columns].mean(1)
    slope, offset = np.polyfit(rows / GRID, light, 1)
    rest = light - slope * rows / GRID - offset
    wave = 2 * np.pi / (DOT_PERIOD * GRID / BASE_SIDE)  # radians per pixel
    if min(_amplitude(rest, wave * rows), _amplitude(rest, wave * columns)) > MIN_DOTS:
        return "dotted "
    return "gradient " if abs(slope) > MIN_RAMP else STYLES[0]


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


def _widened(mask: Mask) -> Mask:
    """The mask and the pixels within two of it."""
    return _smooth(_smooth(mask.astype(np.float32))) > 1e-3


@dataclass(frozen=True)
class _Part:
    """The pixels of one shape, and the ideal shape that they are seen of."""

    region: Mask
    fit: Fit

    @property
    def area(self) -> int:
        return int(self.region.sum())


def _parts(pixels: Colors, region: Mask, world: World) -> list[_Part]:
    """The shapes of one connected region: several where its colors say so and the world knows shapes that overlap."""
    if "in front of" in world.relations:
        parts = _colored_parts(pixels, region)
        if len(parts) > 1:
            kinds = [kind for kind in world.kinds if kind != "ring"]
            others = [_widened(np.logical_or.reduce([p for p in parts if p is not part])) for part in parts]
            return [
                _Part(part, fit_hidden(part & ~other, other, kinds)) for part, other in zip(parts, others, strict=True)
            ]
    fit = fit_open if "ring" in world.kinds else fit_whole
    return [_Part(region, fit(region, world.kinds))]


def _colored_parts(pixels: Colors, region: Mask) -> list[Mask]:
    """The largest connected part of every color that covers enough of a region."""
    chroma = pixels - pixels.min(2, keepdims=True)
    palette = np.stack([_hue(np.asarray(color, np.float32)) for color in COLORS.values()])
    nearest = (chroma @ palette.T).argmax(2)  # [GRID, GRID]
    found = []
    for i in range(len(palette)):
        mask = region & (_smooth((region & (nearest == i)).astype(np.float32)) > 0.5)
        found += sorted(regions(mask, MIN_AREA), key=np.sum)[-1:]
    return found


def _hides_part(front: _Part, behind: _Part) -> bool:
    """True if the pixels that both ideal shapes claim are the first one's."""
    shape = front.region.shape
    if front is behind:
        return False
    both = ideal(front.fit, shape) & ideal(behind.fit, shape)
    return bool(both.sum() >= MIN_COVERED and (both & front.region).sum() > (both & behind.region).sum())


def _read_shape(pixels: Colors, part: _Part) -> SeenShape:
    core = _smooth(part.region.astype(np.float32)) > 0.99  # away from the blended outline
    inside = core if core.any() else part.region
    pattern = "outlined" if part.fit.outlined else _pattern(pixels, inside)
    x, y = ((place + 0.5) / GRID for place in part.fit.centre)
    return SeenShape(
        part.fit.kind,
        _color(pixels[inside]),
        _size(part.fit.radius),
        pattern,
        (x, y),
        part.fit.radius / GRID,
        part.fit.overlap,
    )


def _hue(color: Colors) -> Colors:
    """The direction of a color [3] away from gray: brightness and mixed-in gray cancel out."""
    chroma = color - color.min()
    return np.asarray(chroma / max(np.linalg.norm(chroma), 1e-6))


def _color(values: Colors) -> str:
    """Nearest palette hue of float32 [N, 3]; brightness cancels out, so patterns do not matter."""
    mean = _hue(values.mean(0))
    return max(COLORS, key=lambda name: float(mean @ _hue(np.asarray(COLORS[name], np.float32))))


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
    found = [None if index is None else reading.shapes[index] for index, _ in pairs]
    result = {
        "background": (int(reading.background == scene.background), 1),
        "count": (int(len(reading.shapes) == len(scene.shapes)), 1),
    }
    for name, field in _SHAPE_FIELDS.items():
        hits = sum(
            seen is not None and getattr(seen, field) == getattr(want, field)
            for seen, want in zip(found, scene.shapes, strict=True)
        )
        result[name] = (hits, len(pairs))
    result["position"] = (_in_cell(found[0], scene.shapes[0]), 1) if scene.relation == "alone" else (0, 0)
    steps = list(pairwise(index for index, _ in pairs))
    result["relation"] = (sum(_related(reading, *step, scene.relation) for step in steps), len(steps))
    return result


def _match(seen: tuple[SeenShape, ...], wanted: tuple[Shape, ...]) -> list[tuple[int | None, Shape]]:
    """Pair every wanted shape with the index of at most one seen shape so that most attributes agree."""
    candidates = permutations((*range(len(seen)), *([None] * len(wanted))), len(wanted))
    return max(
        ([*zip(chosen, wanted, strict=True)] for chosen in candidates),
        key=lambda pairs: sum(_agreement(None if i is None else seen[i], want) for i, want in pairs),
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


def _related(reading: Reading, first: int | None, second: int | None, relation: str) -> bool:
    """True if two shapes stand as the relation says: the first hides a part of the second, or the second lies to the
    right of (below) the first by a clear and mainly horizontal (vertical) step."""
    if first is None or second is None:
        return False
    if relation == "in front of":
        return (first, second) in reading.covering
    centres = reading.shapes[second].centre, reading.shapes[first].centre
    along, across = np.subtract(*centres)[:: 1 if relation == "left of" else -1]
    return bool(along > MIN_STEP and along > abs(across))
