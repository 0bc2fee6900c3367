"""The figures of a benchmark as Markdown, from the record that also goes into its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastvar.core.dtypes import human_bytes
from fastvar.errors import InputError
from fastvar.profiling.formatting import flop, percent, times

Record = Mapping[str, Any]


def bench_table(record: Record) -> str:
    """A table for every size: contenders, and how many times faster each is than eager torch in its best precision."""
    return "\n\n".join(_size_table(record["model"], size) for size in record["sizes"])


def _size_table(model: str, size: Record) -> str:
    """Times on the wall and ratios; or CPU seconds, where other processes took part of the cores."""
    results: Mapping[str, Record] = size["contenders"]
    rivals = list(dict.fromkeys(ratio["against"] for ratio in size["ratios"]))
    if size["disturbed"]:
        head, cells = ["contender", "policy", "scales, CPU s", "equal bits"], _cpu_cells
    else:
        head = ["contender", "policy", "scales, s (range)", *(f"times {_rival(name, size)}" for name in rivals)]
        head += ["text, s", "decoder, s", "FLOP/s", "of GEMM peak", "memory", "equal bits"]
        cells = partial(_cells, rivals=rivals, ratios=size["ratios"])
    rows = [cells(name, found) for name, found in results.items()]
    title = f"**{model}, {size['size']}**"
    notes = [f"{name} left: {why}" for name, why in size["failed"].items()]
    notes += [f"{name} was not timed: {why}." for name, why in size["left_out"].items()]
    notes += [f"{size['disturbed']}."] if size["disturbed"] else [_share_line(size["others"])]
    return "\n\n".join((title, markdown_table(head, rows), _peak_line(size["peaks"]), *filter(None, notes)))


def _rival(name: str, size: Record) -> str:
    """A column's head: eager torch goes by the precision that it is fastest in."""
    others = [own for own, found in size["contenders"].items() if found["engine"] == size["contenders"][name]["engine"]]
    return f"{name}, its best" if name in size["best_of_eager"] and len(others) > 1 else name


def _share_line(share: float | None) -> str:
    if share is None:
        return "What other processes took meanwhile is not known on this system."
    return f"Other processes had {share:.0%} of the cores meanwhile."


def _cpu_cells(name: str, found: Record) -> list[str]:
    return [name, found["policy"], _seconds(found["scales_cpu_ms"]), _equal_bits(found)]


def _cells(name: str, found: Record, rivals: Sequence[str], ratios: Sequence[Record]) -> list[str]:
    low, high = found["scales_ms_spread"]
    scales = f"{_seconds(found['scales_ms'])} ({_seconds(low)} to {_seconds(high)})"
    memory = found["memory"]
    return [
        name,
        found["policy"],
        scales,
        *(_ratio(ratios, name, rival) for rival in rivals),
        _seconds(found["text_ms"]),
        _seconds(found["decode_ms"]),
        flop(found["flop_per_s"], "FLOP/s"),
        percent(found["share_of_gemm_peak"]),
        "" if memory is None else human_bytes(memory["growth_bytes"]),
        _equal_bits(found),
    ]


def _equal_bits(found: Record) -> str:
    agreement = found["agreement_with_eager_fp32"]
    return "" if agreement is None else percent(agreement["equal_bits"])


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
        for s in ([] if size["disturbed"] else found["largest_scales_by_launch"])
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
