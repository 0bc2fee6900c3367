"""Which ideal outline a region of pixels is: plain geometry on masks, without colours and without captions."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from demo.draw_scene import SQUARE_HALF_SIDE, STAR_WAIST, signed_distance

Mask = NDArray[np.bool_]  # [H, W]

UNIT_AREAS = {  # of a radius of 1
    "circle": np.pi,
    "square": (2 * SQUARE_HALF_SIDE) ** 2,
    "triangle": 2.0,
    "star": 5 * STAR_WAIST * np.sin(np.pi / 5),
    "hexagon": 1.5 * np.sqrt(3),
}
ROUND = ("circle", "hexagon")  # silhouettes that a ring may be taken for
RING_HOLE_AT_MOST = 0.38  # of the silhouette's area: a ring's is 0.25, that of a round outline 0.45 or more
HOLE_AT_LEAST = 0.07  # of the silhouette's area; the smallest, an outlined small star's, is about 0.2
START_RADII = (15.0, 25.0)  # pixels, of the search for shapes that are hidden in part
STEPS = (4.0, 2.0, 1.0, 0.5)  # pixels, of that search
RADII = (8.0, 40.0)


@dataclass(frozen=True)
class Fit:
    """An ideal shape; lengths in pixels of the mask."""

    kind: str
    radius: float
    centre: tuple[float, float]  # x, y in pixels
    overlap: float = 1.0  # with the region that it was fitted to: intersection over union
    outlined: bool = False


def ideal(fit: Fit, shape: tuple[int, ...]) -> Mask:
    """What lies inside the outline, bool [H, W]."""
    x, y = fit.centre
    columns, rows = (np.arange(side, dtype=np.float32) for side in reversed(shape))
    return signed_distance(fit.kind, columns[None, :] - x, rows[:, None] - y, fit.radius) < 0


def regions(mask: Mask, min_area: int) -> list[Mask]:
    """4-connected components of at least `min_area`, as masks."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.pad(labels, 1)
        neighbours = (spread[:-2, 1:-1], spread[2:, 1:-1], spread[1:-1, :-2], spread[1:-1, 2:], labels)
        spread = np.where(mask, np.maximum.reduce(neighbours), 0)
        if (spread == labels).all():
            break
        labels = spread
    names, areas = np.unique(labels[mask], return_counts=True)
    return [labels == name for name, area in zip(names, areas, strict=True) if area >= min_area]


def filled(region: Mask) -> Mask:
    """The region and its holes."""
    rows, columns = (slice(found.min(), found.max() + 1) for found in np.nonzero(region))
    around = np.pad(~region[rows, columns], 1, constant_values=True)
    outside = next(part for part in regions(around, 1) if part[0, 0])
    whole = region.copy()
    whole[rows, columns] = ~outside[1:-1, 1:-1]
    return whole


def fit_whole(region: Mask, kinds: Iterable[str]) -> Fit:
    """The kind whose ideal outline of equal area and centroid overlaps best.

    Area and centroid, unlike a bounding box, hardly move when a few outline pixels are wrong.
    """
    rows, columns = np.nonzero(region)
    area, y, x = len(rows), rows.mean(), columns.mean()
    fits = []
    for kind in kinds:
        radius = float(np.sqrt(area / UNIT_AREAS[kind]))
        centre_y = y - radius / 3 if kind == "triangle" else y  # a triangle's centroid lies below its middle
        fit = Fit(kind, radius, (float(x), float(centre_y)))
        fits.append(replace(fit, overlap=_overlap(ideal(fit, region.shape), region)))
    return max(fits, key=lambda fit: (fit.overlap, fit.kind))


def fit_open(region: Mask, kinds: tuple[str, ...]) -> Fit:
    """As `fit_whole`, by the silhouette of a region that may be a ring or an outline."""
    silhouette = filled(region)
    fit = fit_whole(silhouette, [kind for kind in kinds if kind != "ring"])
    hole = 1 - region.sum() / silhouette.sum()
    if hole < HOLE_AT_LEAST:
        return fit
    if fit.kind in ROUND and hole < RING_HOLE_AT_MOST:
        return replace(fit, kind="ring")
    return replace(fit, outlined=True)


def fit_hidden(part: Mask, unknown: Mask, kinds: Iterable[str]) -> Fit:
    """The shape of which `part` is what is seen, where the pixels of `unknown` may belong to it or not."""
    rows, columns = (
        slice(max(found.min() - 2 * int(START_RADII[-1]), 0), found.max() + 2 * int(START_RADII[-1]))
        for found in np.nonzero(part)
    )
    seen, known = part[rows, columns], ~unknown[rows, columns]
    y, x = (found.mean() for found in np.nonzero(seen))
    fits = []
    for kind in kinds:
        for start in START_RADII:
            quality, (left, top, radius) = _climb(kind, (float(x), float(y), start), seen, known)
            fits.append(Fit(kind, radius, (left + columns.start, top + rows.start), quality))
    return max(fits, key=lambda fit: fit.overlap)


def _climb(
    kind: str, start: tuple[float, float, float], seen: Mask, known: Mask
) -> tuple[float, tuple[float, float, float]]:
    """Move and scale a shape as long as it covers what is seen better: the quality, and x, y and radius."""

    def quality(place: NDArray[np.floating]) -> float:
        if not RADII[0] <= place[2] <= RADII[1]:
            return -1.0
        return _overlap(ideal(Fit(kind, place[2], (place[0], place[1])), seen.shape) & known, seen)

    best = np.array(start)
    reached = quality(best)
    moves = np.concatenate((np.eye(3), -np.eye(3)))
    for step in STEPS:
        while True:
            tried = [(quality(best + step * move), i) for i, move in enumerate(moves)]
            found, i = max(tried)
            if found <= reached:
                break
            best, reached = best + step * moves[i], found
    return reached, (float(best[0]), float(best[1]), float(best[2]))


def _overlap(first: Mask, second: Mask) -> float:
    """Intersection over union."""
    return float((first & second).sum() / max((first | second).sum(), 1))
