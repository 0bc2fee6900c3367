"""Formats of the figures shown: milliseconds, FLOP, shares, sizes."""

from __future__ import annotations

from collections.abc import Sequence

_PREFIXES = ("", "k", "M", "G", "T", "P")


def three_digits(value: float) -> str:
    """0.1234 -> '0.12', 12.34 -> '12.3', 1234.5 -> '1,234'."""
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def milliseconds(value: float) -> str:
    """1234.5 -> '1,234 ms'."""
    return f"{three_digits(value)} ms"


def flop(value: float, unit: str = "FLOP") -> str:
    """1.1e10 -> '11.0 GFLOP'."""
    power = 0
    while value >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    number = f"{value:.0f}" if power == 0 else three_digits(value)
    return f"{number} {_PREFIXES[power]}{unit}"


def percent(share: float) -> str:
    """0.1234 -> '12.3 %'."""
    return f"{100 * share:.1f} %"


def pixels(size: Sequence[int]) -> str:
    """(height, width) -> '640x480'."""
    return f"{size[1]}x{size[0]}"


def times(ratio: float) -> str:
    """1.7182 -> '1.72×'."""
    return f"{ratio:.2f}×"  # noqa: RUF001 the typographic sign
