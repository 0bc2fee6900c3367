"""The results of `fastvar profile`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.schedule import Size
from .estimates.costs import Cost
from .samples import Recording


@dataclass(frozen=True)
class Request:
    """What to draw and how often. Without a prompt it is the default one, or random text features."""

    prompt: str | None = None
    seed: int = 0
    runs: int = 10
    warm_up: int = 2
    guidance_scale: float | None = None
    threads: int | None = None
    budget_bytes: int | None = None
    batch: int = 1  # images of a pass, seed by seed


@dataclass(frozen=True)
class Spread:
    """Milliseconds over all runs; the 95th percentile is interpolated linearly."""

    median: float
    p95: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of one figure per run."""
    return Spread(float(np.median(values)), float(np.percentile(values, 95)))


@dataclass(frozen=True)
class Row:
    """A stage of the image, or an engine at one scale over all layers that it runs for.

    Tokens are per guidance row, None without image tokens. `share` is the share of the time of all rows of the table.
    Memory is that of the memory run, before the first launch and after the last.
    """

    name: str
    kind: str
    launches: int
    ms: Spread
    share: float
    cost: Cost
    scale: int | None = None
    size: Size | None = None
    tokens: int | None = None
    kept: int | None = None
    memory_before_bytes: int | None = None
    memory_after_bytes: int | None = None

    @property
    def flop_per_s(self) -> float:
        """FLOP/s at the median time."""
        return self.cost.flop / self.ms.median * 1e3 if self.ms.median else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second at the median time."""
        return self.cost.bytes_moved / self.ms.median * 1e3 if self.ms.median else 0.0


@dataclass(frozen=True)
class LaunchMs:
    """Median milliseconds of one launch."""

    engine: str
    kind: str
    scale: int | None
    layer: int | str | None
    ms: float


@dataclass(frozen=True)
class MemoryEvent:
    """A launch, or the loading, in the memory run; seconds since its start."""

    name: str
    scale: int | None
    start_s: float
    end_s: float
    before_bytes: int
    after_bytes: int


@dataclass(frozen=True)
class MemoryRun:
    """Memory over time, from before the bundle is loaded until its first image is drawn."""

    recording: Recording
    loading: MemoryEvent
    launches: tuple[MemoryEvent, ...]  # in order


@dataclass(frozen=True)
class KeptMap:
    """How many of the selections of a scale (pruned layers x sub-layers) kept each token of the conditional row."""

    scale: int
    size: Size
    kept: int
    selections: int
    counts: tuple[tuple[int, ...], ...]  # [h][w]


@dataclass(frozen=True)
class BundleProfile:
    """All results of one bundle."""

    label: str
    facts: dict[str, Any]  # path, digest, model, size, policy, ..., ready for json.dumps
    totals: dict[str, Spread]  # text, scales, decoder, image
    stages: tuple[Row, ...]
    engines: tuple[Row, ...]
    launches: tuple[LaunchMs, ...]
    memory: MemoryRun
    kv_cache_bytes: int
    kept: tuple[KeptMap, ...]
    image_png: bytes

    @property
    def cost(self) -> Cost:
        """Cost of the whole image."""
        return sum((row.cost for row in self.stages), Cost())

    def stage(self, name: str) -> Row | None:
        """The row of a stage; None if the policy skips it."""
        return next((row for row in self.stages if row.name == name), None)


@dataclass(frozen=True)
class Profile:
    """One bundle, and if asked for another one, measured alternately in the same process."""

    when: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    budget_bytes: int | None
    subject: BundleProfile
    against: BundleProfile | None = None

    @property
    def bundles(self) -> tuple[BundleProfile, ...]:
        """The other bundle, with which the subject is compared, comes first."""
        return (self.subject,) if self.against is None else (self.against, self.subject)

    def speedup(self, part: str) -> float | None:
        """How many times faster than the other bundle a part is: "scales", "image", ...; None without another."""
        if self.against is None:
            return None
        return self.against.totals[part].median / self.subject.totals[part].median
