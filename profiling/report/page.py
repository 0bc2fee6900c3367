"""A profile as one HTML page that needs no network: style and plots inline, images as data.

The template report.html holds the prose; Jinja2 escapes every value in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.dtypes import human_bytes
from ...core.platform import import_extra
from ..formatting import flop, milliseconds, percent, three_digits, times
from ..records import Profile, Row
from ..sampler import INTERVAL_S
from ..samples import Sample
from . import kept_images, plots
from .columns import Column

WIDE, HALF, NARROW = 1036.0, 500.0, 330.0  # pixels of a plot: across the page, beside another, on a phone
NOISY = 1.5  # ratio of the 95th percentile to the median above which the machine was busy
FILTERS = {"bytes": human_bytes, "flop": flop, "ms": milliseconds, "percent": percent, "times": times}
COLUMNS = (
    Column("tokens", format="{:,}".format),
    Column("kept", format="{:,}".format),
    Column("ms", "ms.median", three_digits),
    Column("ms, p95", "ms.p95", three_digits),
    Column("share", format=percent),
    Column("FLOP", "cost.flop", flop),
    Column("FLOP/s", "flop_per_s", lambda rate: flop(rate, "FLOP/s")),
    Column("bytes moved", "cost.bytes_moved", human_bytes),
    Column("bytes/s", "bytes_per_s", lambda rate: f"{human_bytes(rate)}/s"),
    Column("memory before", "memory_before_bytes", human_bytes),
    Column("memory after", "memory_after_bytes", human_bytes),
    Column("launches"),
)
GAUGES = {
    "GPU use": ("utilisation_percent", "%"),
    "GPU memory use": ("memory_utilisation_percent", "%"),
    "SM clock": ("sm_clock_mhz", "MHz"),
    "memory clock": ("memory_clock_mhz", "MHz"),
    "power": ("power_w", "W"),
    "temperature": ("temperature_c", "°C"),
}


def report(profile: Profile) -> str:
    """The page.

    Raises:
        BackendError: Jinja2 is not installed.
    """
    jinja2 = import_extra("jinja2", "profile")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    page: str = environment.get_template("report.html").render(_values(profile))
    return page


def _values(profile: Profile) -> dict[str, Any]:
    """The names that the template uses."""
    versus = f" against {profile.against.label}" if profile.against else ""
    memory_top = plots.memory_top([bundle.memory for bundle in profile.bundles])
    whole = [bundle.totals["image"] for bundle in profile.bundles]
    return {
        "profile": profile,
        "subject": profile.subject,
        "against": profile.against,
        "settings": profile.settings,
        "title": profile.subject.label + versus,
        "environment": profile.environment,
        "noisy": NOISY if any(found.p95 >= NOISY * found.median for found in whole) else None,
        "widths": (WIDE, HALF, NARROW),
        "interval_ms": INTERVAL_S * 1e3,
        "gauges": lambda bundle: _gauges(bundle.memory.recording.samples),
        "columns": COLUMNS,
        "total": lambda bundle: Row("image", "image", 0, bundle.totals["image"], 1.0, bundle.cost),
        "plots": plots,
        "memory_plot": lambda bundle, width, kind: plots.memory(bundle, memory_top, width, kind),
        "images": kept_images,
    }


def _gauges(samples: Sequence[Sample]) -> dict[str, str]:
    """The range of each reading besides memory over all samples."""
    readings = {name: [getattr(sample, field) for sample in samples] for name, (field, _) in GAUGES.items()}
    known = {name: [value for value in values if value is not None] for name, values in readings.items()}
    return {name: f"{min(found):g} to {max(found):g} {GAUGES[name][1]}" for name, found in known.items() if found}
