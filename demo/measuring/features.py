"""How far a set of images is from true renders: Frechet's distance between statistics of what the scorer measures.

As the inception distance (Heusel et al., 2017), on measurements of shapes in place of a network's features. It also
sees what no reading of an attribute counts, such as frayed outlines and washed-out colours.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from demo.draw_scene import Pixels
from demo.read_scene import Reading, read_scene
from demo.scenes import SHIPPED, World

# Each measurement, and a difference in it that is plain to see: the unit of the distance.
UNITS = {
    "number of shapes": 1.0,
    "mean radius": 0.03,  # of the side
    "mean overlap with the ideal outline": 0.1,
    "worst overlap with the ideal outline": 0.1,
    "share of edge pixels": 0.02,
    "strength of edges": 30.0,  # levels, as what follows
    "red": 20.0,
    "green": 20.0,
    "blue": 20.0,
    "spread of levels": 20.0,
}
EDGE = 24.0  # levels between neighbours


def features(image: Pixels, reading: Reading) -> NDArray[np.floating]:
    """What `UNITS` names, of an image and of what the scorer read in it, in these units: [10]."""
    levels = image.astype(np.float64)
    steps = np.abs(np.diff(levels, axis=1)).max(2)
    edges = steps > EDGE
    overlaps = [shape.overlap for shape in reading.shapes] or [0.0]
    radii = [shape.radius for shape in reading.shapes] or [0.0]
    measured = np.array(
        (
            len(reading.shapes),
            np.mean(radii),
            np.mean(overlaps),
            min(overlaps),
            edges.mean(),
            steps[edges].mean() if edges.any() else 0.0,
            *levels.mean((0, 1)),
            levels.std(),
        )
    )
    return np.asarray(measured / np.array(list(UNITS.values())))


def frechet_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Between the normal distributions with the means and covariances of two sets of features [N, K]."""
    means = np.square(first.mean(0) - second.mean(0)).sum()
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The trace of the root of a product of two covariances: its eigenvalues are real and not negative.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    return float(means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots)


def distance_to_truth(images: Sequence[Pixels], truth: Sequence[Pixels], world: World = SHIPPED) -> float:
    """Frechet's distance of drawn images to true renders of the same scenes."""
    drawn, true = (np.stack([features(i, read_scene(i, world)) for i in own]) for own in (images, truth))
    return frechet_distance(drawn, true)
