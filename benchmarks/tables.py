"""The figures of a benchmark as Markdown, from the record that also goes into its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastvar.core.dtypes import human_bytes
from fastvar.errors import InputError
from fastvar.profiling.formatting import flop, percent, times

Record = Mapping[str, Any]


def bench_table(record: Record) -> str:
    """A table for every size: contenders, and how many times faster each is than eager torch."""
    return "\n\n".join(_size_table(record["model"], size) for size in record["sizes"])


def _size_table(model: str, size: Record) -> str:
    results: Mapping[str, Record] = size["contenders"]
    eager = [name for name, found in results.items() if found["engine"].startswith("eager")]
    head = ["contender", "policy", "scales, s (range)", *(f"against {name}" for name in eager)]
    head += ["text, s", "decoder, s", "FLOP/s", "of GEMM peak", "memory", "equal bits"]
    rows = [_cells(name, found, eager, size["ratios"]) for name, found in results.items()]
    title = f"**{model}, {size['size']}**"
    failures = [f"{name} left: {why}" for name, why in size["failed"].items()]
    return "\n\n".join((title, markdown_table(head, rows), _peak_line(size["peaks"]), *failures))


def _cells(name: str, found: Record, eager: Sequence[str], ratios: Sequence[Record]) -> list[str]:
    low, high = found["scales_ms_spread"]
    scales = f"{_seconds(found['scales_ms'])} ({_seconds(low)} to {_seconds(high)})"
    faster = [_ratio(ratios, name, other) for other in eager]
    memory = found["memory"]
    return [
        name,
        found["policy"],
        scales,
        *faster,
        _seconds(found["text_ms"]),
        _seconds(found["decode_ms"]),
        flop(found["flop_per_s"], "FLOP/s"),
        percent(found["share_of_gemm_peak"]),
        "" if memory is None else human_bytes(memory["growth_bytes"]),
        percent(found["agreement_with_eager_fp32"]["equal_bits"]),
    ]


def _ratio(ratios: Sequence[Record], name: str, other: str) -> str:
    for ratio in ratios:
        if (ratio["contender"], ratio["against"]) == (name, other):
            found = ratio["scales"]
            return f"{times(found['median'])} ({found['min']:.2f} to {found['max']:.2f})"
    return ""


def breakdown_table(record: Record) -> str:
    """The largest scales of every engine contender, by kind of launch."""
    head = ["size", "contender", "scale", "kept", "kind", "ms", "FLOP/s", "of GEMM peak", "of copy peak"]
    rows = [
        [size["size"], name, f"{s['size'][1]}x{s['size'][0]}", f"{s['kept']:,}", kind, *_achieved(part)]
        for size in record["sizes"]
        for name, found in size["contenders"].items()
        for s in found["largest_scales_by_launch"]
        for kind, part in {"all": s, **s["kinds"]}.items()
    ]
    return markdown_table(head, rows) if rows else ""


def _achieved(part: Record) -> list[str]:
    shares = percent(part["share_of_gemm_peak"]), percent(part["share_of_copy_peak"])
    return [f"{part['ms']:,.1f}", flop(part["flop_per_s"], "FLOP/s"), *shares]


def _peak_line(peaks: Record) -> str:
    """What shares are shares of."""
    gemms = [f"a {name} GEMM {flop(value, 'FLOP/s')}" for name, value in peaks.items() if name != "copy"]
    copy = f"a copy {peaks['copy'] / 1e9:.1f} GB/s read and written"
    return f"Measured on this machine in the same run: {', '.join((*gemms, copy))}."


def _seconds(ms: float | None) -> str:
    return "" if ms is None else f"{ms / 1e3:.3g}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def placed_in(page: str, table: str, begin: str, end: str) -> str:
    """A page with the table between its marks.

    Raises:
        InputError: it has no such marks.
    """
    before, mark, rest = page.partition(begin)
    _, close, after = rest.partition(end)
    if not mark or not close:
        raise InputError("the page has no place for the table", expected=f"a line {begin} and a line {end} behind it")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"
