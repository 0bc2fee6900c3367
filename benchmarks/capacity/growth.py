"""Where the bottleneck moves as replicas are added: arithmetic on what was measured. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STORE_GBIT_S = 10.0  # of a shared store that all machines read from; an assumption
LARGE_BUNDLE_BYTES = round(6.58 * 2**30)  # Infinity-2B at 1024x1024, text encoder included: docs/benchmarks.md


@dataclass(frozen=True)
class Measured:
    """What the arithmetic starts from.

    images_per_s: of one replica. bundle_bytes: that it loads. answer_bytes: of an image's answer. requests_per_s:
    through one proxy and one ingress to a replica. shares_per_s, images_a_share: that one driver hands out.
    entry_bytes: of an image in a share.
    """

    images_per_s: float
    bundle_bytes: int
    answer_bytes: int
    requests_per_s: float
    shares_per_s: float
    images_a_share: int
    entry_bytes: int

    @classmethod
    def of(cls, images_per_s: float, front: Mapping[str, Any]) -> Measured:
        """From the JSON of `python -m benchmarks.serving.front`."""
        rest = {name: front[name] for name in ("bundle_bytes", "answer_bytes", "shares_per_s", "images_a_share")}
        requests = front["replica"]["requests_per_s"]
        return cls(images_per_s=images_per_s, requests_per_s=requests, entry_bytes=front["entry_bytes"], **rest)


def grown(measured: Measured, replicas: int) -> dict[str, float]:
    """What so many replicas ask of the rest, when each of them always draws."""
    rate = replicas * measured.images_per_s
    return {
        "replicas": replicas,
        "images_per_s": rate,
        "load_s": replicas * measured.bundle_bytes * 8 / (STORE_GBIT_S * 1e9),
        "large_load_s": replicas * LARGE_BUNDLE_BYTES * 8 / (STORE_GBIT_S * 1e9),
        "answers_gbit_s": rate * measured.answer_bytes * 8 / 1e9,
        "ingresses": math.ceil(rate / measured.requests_per_s),
        "driver_share": rate / measured.images_a_share / measured.shares_per_s,
        "store_mb_s": rate * measured.entry_bytes / 1e6,
    }


HEAD = (
    "replicas",
    "images a second",
    "the bundle to all of them",
    "Infinity-2B's to all of them",
    "answers",
    "ingresses",
    "share of one driver's time",
    "rows through the object store",
)


def rows(measured: Measured, counts: Sequence[int]) -> list[list[str]]:
    """Cells of a table under `HEAD`."""
    found = []
    for one in (grown(measured, count) for count in counts):
        found.append(
            [
                f"{one['replicas']:,}",
                f"{one['images_per_s']:,.1f}",
                f"{one['load_s']:,.2f} s",
                f"{one['large_load_s']:,.0f} s",
                f"{one['answers_gbit_s']:.3g} Gbit/s",
                f"{one['ingresses']:,}",
                f"{one['driver_share']:.2%}",
                f"{one['store_mb_s']:.3g} MB/s",
            ]
        )
    return found
