"""Draws scenes, anti-aliased, at any side. Numpy only.

Lengths are in pixels of a 256x256 image and scale with the side.
"""

import numpy as np
from numpy.typing import NDArray

from demo.scenes import COLORS, LEVELS, SIZES, Scene, Shape

Pixels = NDArray[np.uint8]  # [H, W, 3]
Floats = NDArray[np.floating]

BASE_SIDE = 256
STRIPE_WIDTH = 8  # two stripes make the period, which equals the tokenizer's 16x16 patch at 256
DARKENED = 0.45  # brightness of a pattern's second colour
OUTLINE_WIDTH = 5.0
SQUARE_HALF_SIDE = 0.9  # in radii: keeps the visual weight of the kinds similar
STAR_WAIST = 0.5  # radius of a star's inner corners, in radii
RING_HOLE = 0.5  # radius of a ring's hole, in radii
MAX_SHIFT = 5.0
MAX_SCALING = 0.05
RAMPS = {"white": 70.0, "black": 70.0, "gray": 80.0}  # levels from the top of a gradient to its bottom
DOT_PERIOD, DOT_RADIUS = 16, 3.0
DOTS = {"white": -60.0, "black": 70.0, "gray": 60.0}  # level of a dot beside its background


def render(scene: Scene, size: int = BASE_SIDE, rng: np.random.Generator | None = None) -> Pixels:
    """Draw the scene anti-aliased; with `rng`, shapes move by up to 5 px and scale by up to 5 %.

    Returns uint8 [size, size, 3]. Patterns are locked to the image grid, not to the shape, so that
    every 16x16 patch (at 256) inside a patterned shape looks alike.
    """
    unit = size / BASE_SIDE
    image = np.empty((size, size, 3), np.float32)
    image[:] = background_levels(scene.background, size)[..., None]
    jitters = [np.zeros(3) if rng is None else rng.uniform(-1, 1, 3) for _ in scene.shapes]
    back_to_front = slice(None, None, -1 if scene.relation == "in front of" else 1)
    for shape, jitter in list(zip(scene.shapes, jitters, strict=True))[back_to_front]:
        x, y = np.asarray(shape.centre) * size + jitter[:2] * MAX_SHIFT * unit
        _draw(image, shape, x, y, SIZES[shape.size] * unit * (1 + MAX_SCALING * jitter[2]), unit)
    return np.rint(image).astype(np.uint8)


def background_levels(background: str, size: int) -> NDArray[np.float32]:
    """The gray level of every pixel of a background, float32 [size, size]."""
    style, _, level = background.rpartition(" ")
    levels = np.full((size, size), LEVELS[level], np.float32)
    places = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(BASE_SIDE / size)  # in pixels at 256
    if style == "gradient":
        levels += _ramp(level, places / BASE_SIDE)[:, None]
    elif style == "dotted":
        offsets = places % DOT_PERIOD - DOT_PERIOD / 2
        distance = (np.hypot(offsets[:, None], offsets[None, :]) - DOT_RADIUS) * size / BASE_SIDE
        levels += np.clip(0.5 - distance, 0, 1) * np.float32(DOTS[level])
    return levels


def _ramp(level: str, y: Floats) -> NDArray[np.float32]:
    """What a gradient adds at heights y, 0 at the top and 1 at the bottom: always lighter at the top."""
    height = {"white": -y, "black": 1 - y, "gray": 0.5 - y}[level]
    return np.asarray(height * RAMPS[level], np.float32)


def _draw(image: NDArray[np.float32], shape: Shape, x: float, y: float, radius: float, unit: float) -> None:
    """Blend one shape into `image` (float32 [H, W, 3], in place), touching its bounding box only."""
    left, top = max(int(x - radius) - 2, 0), max(int(y - radius) - 2, 0)
    window = image[top : int(y + radius) + 3, left : int(x + radius) + 3]
    rows = np.arange(top, top + window.shape[0], dtype=np.float32)[:, None] + 0.5
    columns = np.arange(left, left + window.shape[1], dtype=np.float32)[None, :] + 0.5
    distance = signed_distance(shape.kind, columns - np.float32(x), rows - np.float32(y), radius)
    if shape.pattern == "outlined":
        distance = abs(distance + OUTLINE_WIDTH * unit / 2) - OUTLINE_WIDTH * unit / 2
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
    if kind == "ring":
        middle, half_width = (1 + RING_HOLE) / 2 * radius, (1 - RING_HOLE) / 2 * radius
        return np.asarray(abs(np.hypot(x, y) - middle) - half_width)
    if kind == "hexagon":  # corners to the left and to the right
        half_height = np.sqrt(np.float32(3)) / 2
        return np.asarray(np.maximum(abs(y), half_height * abs(x) + abs(y) / 2) - half_height * radius)
    if kind == "star":
        return _star_distance(x, y, radius)
    # triangle: apex (0, -radius), base corners (+-radius, radius)
    return np.asarray(np.maximum(y - radius, (2 * abs(x) - y - radius) / np.sqrt(np.float32(5))))


def _star_distance(x: Floats, y: Floats, radius: float) -> Floats:
    """Of a star with five points, one of them up: the distance to the nearest of its ten edges."""
    tenth = np.pi / 5
    angle = abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)  # 0 at a point, a tenth of the turn at a waist
    distance = np.hypot(x, y)
    along, across = distance * np.cos(angle), distance * np.sin(angle)
    waist = STAR_WAIST * np.array((np.cos(tenth), np.sin(tenth)))
    normal = np.array((waist[1], 1 - waist[0])) / np.hypot(waist[1], 1 - waist[0])
    return np.asarray((along - radius) * normal[0] + across * normal[1], np.float32)


def _brightness(pattern: str, x: Floats, y: Floats) -> Floats:
    """1 or `DARKENED` per pixel, float32, broadcastable to [h, w]; x, y in pixels at 256."""
    if pattern in ("plain", "outlined"):
        return np.ones((1, 1), np.float32)
    stripe = (y // STRIPE_WIDTH).astype(np.int32)
    if pattern == "checked":
        stripe = stripe + (x // STRIPE_WIDTH).astype(np.int32)
    return np.where(stripe % 2 == 0, np.float32(1), np.float32(DARKENED))
