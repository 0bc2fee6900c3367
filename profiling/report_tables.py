"""The tables of a report as HTML: stages, engines, and what the device told of itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..engines.dtypes import human_bytes
from .figures import flop, percent, three_digits
from .records import BundleProfile, Row
from .samples import Sample

HEADINGS = (
    *("tokens", "kept", "ms", "ms, p95", "share", "FLOP", "FLOP/s", "bytes moved", "bytes/s"),
    *("memory before", "memory after", "launches"),
)


def stage_table(bundle: BundleProfile) -> str:
    """Text, scales, decoder, and their sum."""
    caption = f"{bundle.label}: stages, timed in whole images"
    whole = bundle.totals["image"]
    cells = ["", "", three_digits(whole.median), three_digits(whole.p95), "", flop(bundle.cost.flop)]
    cells += [flop(bundle.cost.flop / whole.median * 1e3, "FLOP/s"), human_bytes(bundle.cost.bytes_moved)]
    cells += [f"{human_bytes(bundle.cost.bytes_moved / whole.median * 1e3)}/s", "", "", ""]
    foot = "<th scope=row>image</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return _table(caption, "stage", [_row(row, _stage_name(row)) for row in bundle.stages], foot)


def engine_table(bundle: BundleProfile) -> str:
    """Every engine at every scale."""
    caption = f"{bundle.label}: engines, all layers of one together, timed launch by launch"
    return _table(caption, "engine", [_row(row, _engine_name(row)) for row in bundle.engines])


def _stage_name(row: Row) -> str:
    grid = "" if row.size is None else f" <small>{row.size[1]}×{row.size[0]}</small>"  # noqa: RUF001
    return escape(row.name) + grid


def _engine_name(row: Row) -> str:
    where = "" if row.scale is None else f" <small>scale {row.scale}</small>"
    return f"{escape(row.name)}{where}"


def _row(row: Row, name: str) -> str:
    cells = (
        *("" if n is None else f"{n:,}" for n in (row.tokens, row.kept)),
        *(three_digits(row.ms.median), three_digits(row.ms.p95), percent(row.share)),
        *(flop(row.cost.flop), flop(row.flop_per_s, "FLOP/s")),
        *(human_bytes(row.cost.bytes_moved), f"{human_bytes(row.bytes_per_s)}/s"),
        *("" if n is None else human_bytes(n) for n in (row.memory_before_bytes, row.memory_after_bytes)),
        str(row.launches),
    )
    return f"<tr><th scope=row>{name}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _table(caption: str, first: str, rows: Sequence[str], foot: str = "") -> str:
    """In a box of its own, which scrolls where the page is too narrow; reachable by keyboard."""
    head = "".join(f"<th scope=col>{escape(heading)}</th>" for heading in (first, *HEADINGS))
    footer = f"<tfoot><tr>{foot}</tr></tfoot>" if foot else ""
    return (
        f'<div class="box" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody>{footer}</table></div>"
    )


GAUGES = {
    "GPU use": ("utilisation_percent", "%"),
    "GPU memory use": ("memory_utilisation_percent", "%"),
    "SM clock": ("sm_clock_mhz", "MHz"),
    "memory clock": ("memory_clock_mhz", "MHz"),
    "power": ("power_w", "W"),
    "temperature": ("temperature_c", "°C"),
}


def gauges(samples: Sequence[Sample]) -> dict[str, str]:
    """What the device told besides memory, from the lowest to the highest of the samples."""
    found: dict[str, str] = {}
    for name, (field, unit) in GAUGES.items():
        values = [value for sample in samples if (value := getattr(sample, field)) is not None]
        if values:
            found[name] = f"{min(values):g} to {max(values):g} {unit}"
    return found
