"""Two kinds of plot as self-contained SVG text: points with a front, and lines over logarithmic axes.

Knows numbers and labels only: no library, no file, nothing of what is plotted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 440
LEFT, RIGHT, TOP, BOTTOM = 68, 18, 44, 52  # margins around the axes
INK, GRID, PAPER, FAINT = "#222222", "#e4e4e4", "#ffffff", "#9aa5b1"
COLOURS = ("#1f6fb4", "#d1600a", "#2a8a3e", "#8a3ea8", "#b02a37")  # told apart by lightness as well
MARK = 4.5  # radius
HALO = f'stroke="{PAPER}" stroke-width="3" paint-order="stroke"'  # keeps a label readable on a line

XY = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot; its label shows where the pointer rests, and beside it where `named`."""

    x: float
    y: float
    label: str = ""
    on_front: bool = False
    named: bool = False


@dataclass(frozen=True)
class Line:
    """Points joined in order, in the colour of its number; `dashed` for what was not measured."""

    label: str
    points: Sequence[XY]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis: its title, and the range it shows."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def part(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        ends = [math.log(v) if self.logarithmic else v for v in (self.low, value, self.high)]
        return (ends[1] - ends[0]) / (ends[2] - ends[0])


def scatter(title: str, x_title: str, y_title: str, points: Sequence[Point], legend: tuple[str, str]) -> str:
    """Points, and a line from left to right through those on the front that rise above all before them.

    Args:
        legend: what a point on the front is, and what another one is.
    """
    x, y = _linear_axis(x_title, [p.x for p in points]), _linear_axis(y_title, [p.y for p in points])
    to = _placer(x, y)
    drawn = [_polyline([to(p.x, p.y) for p in _rising([p for p in points if p.on_front])], COLOURS[0])]
    for point in sorted(points, key=lambda p: p.on_front):  # the front on top
        drawn.append(_mark(to(point.x, point.y), COLOURS[0] if point.on_front else FAINT, point.label))
    drawn += _names([(to(p.x, p.y), p.label) for p in points if p.named])
    entries = [(legend[0], COLOURS[0], False), (legend[1], FAINT, False)]
    return _svg(title, [*_frame(x, y), *drawn, *_legend(entries)])


def log_lines(
    title: str, x_title: str, y_title: str, lines: Sequence[Line], x_names: Callable[[float], str] = lambda x: f"{x:g}"
) -> str:
    """Lines over two logarithmic axes; ticks of the horizontal one lie at the points, named by `x_names`."""
    xs = sorted({x for line in lines for x, _ in line.points})
    x = Axis(x_title, xs[0] / 1.15, xs[-1] * 1.15, xs, logarithmic=True)
    y = _log_axis(y_title, [y for line in lines for _, y in line.points])
    to = _placer(x, y)
    drawn: list[str] = []
    entries = []
    for line in lines:
        colour = COLOURS[line.colour % len(COLOURS)]
        places = [to(*point) for point in line.points]
        drawn.append(_polyline(places, colour, line.dashed))
        drawn += [
            _mark(place, colour, f"{line.label}: {value:,.4g} at {x_names(x)}")
            for place, (x, value) in zip(places, line.points, strict=True)
        ]
        entries.append((line.label, colour, line.dashed))
    return _svg(title, [*_frame(x, y, x_names), *drawn, *_legend(entries)])


def _rising(points: Sequence[Point]) -> list[Point]:
    """Every front has more values than two: some of its points lie under its line in the plane that is shown."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not kept or point.y > kept[-1].y:
            kept.append(point)
    return kept


def _linear_axis(title: str, values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    low, high = low - margin, high + margin
    step = _round_step((high - low) / 5)
    ticks = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(title, low, high, ticks)


def _round_step(step: float) -> float:
    """The nearest larger of 1, 2 and 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _log_axis(title: str, values: Sequence[float]) -> Axis:
    low, high = min(values) / 1.4, max(values) * 1.4
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return Axis(title, low, high, [tick for tick in ticks if low <= tick <= high], logarithmic=True)


def _placer(x: Axis, y: Axis) -> Callable[[float, float], XY]:
    def place(a: float, b: float) -> XY:
        across, up = x.part(a), y.part(b)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    return place


def _frame(x: Axis, y: Axis, x_names: Callable[[float], str] = lambda x: f"{x:g}") -> list[str]:
    """Grid lines, tick labels and titles of both axes."""
    bottom, right, middle = HEIGHT - BOTTOM, WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2
    parts = []
    for tick in x.ticks:
        at = LEFT + x.part(tick) * (right - LEFT)
        parts.append(_segment((at, TOP), (at, bottom), GRID))
        parts.append(_text((at, bottom + 18), x_names(float(f"{tick:.6g}")), "middle"))
    for tick in y.ticks:
        at = bottom - y.part(tick) * (bottom - TOP)
        parts.append(_segment((LEFT, at), (right, at), GRID))
        parts.append(_text((LEFT - 8, at + 4), _short(float(f"{tick:.6g}")), "end"))
    parts += [_segment((LEFT, bottom), (right, bottom), INK), _segment((LEFT, TOP), (LEFT, bottom), INK)]
    parts.append(_text(((LEFT + right) / 2, HEIGHT - 12), x.title, "middle"))
    turned = f'transform="rotate(-90 16 {middle:.1f})"'
    return [*parts, _text((16, middle), y.title, "middle", turned)]


def _short(value: float) -> str:
    """12000 -> "12 k": tick labels stay short."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):g}{unit}"
    return f"{value:g}"


def _legend(entries: Sequence[tuple[str, str, bool]]) -> list[str]:
    """In a row under the title: label, colour, dashed."""
    parts, at = [], float(LEFT)
    for label, colour, dashed in entries:
        parts.append(_segment((at, TOP - 10), (at + 20, TOP - 10), colour, 2.5, dashed))
        parts.append(_text((at + 25, TOP - 6), label, "start"))
        at += 40 + 6.4 * len(label)
    return parts


def _names(named: Iterable[tuple[XY, str]]) -> list[str]:
    """Labels beside points, on the side with room, each clear of those before it."""
    taken: list[XY] = []
    parts = []
    for (x, y), label in sorted(named):
        leftward = x > WIDTH * 0.62
        at = (x - 8, y - 8) if leftward else (x + 8, y + 15)  # clear of a front that rises
        while any(abs(at[0] - other[0]) < 7 * len(label) and abs(at[1] - other[1]) < 13 for other in taken):
            at = (at[0], at[1] + (-13 if leftward else 13))
        taken.append(at)
        parts.append(_text(at, label, "end" if leftward else "start", HALO))
    return parts


def _polyline(places: Sequence[XY], colour: str, dashed: bool = False) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'


def _mark(place: XY, colour: str, label: str) -> str:
    circle = f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="{MARK}" fill="{colour}" stroke="{PAPER}"'
    return f"{circle}><title>{escape(label)}</title></circle>"


def _segment(start: XY, end: XY, colour: str, width: float = 1, dashed: bool = False) -> str:
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dash}/>'


def _text(place: XY, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{place[0]:.1f}" y="{place[1]:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = f'font-family="Helvetica, Arial, sans-serif" font-size="12.5" fill="{INK}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style} role="img">'
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>'
    heading = _text((LEFT, 20), title, "start", 'font-size="15" font-weight="bold"')
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, heading, *parts, "</svg>"]) + "\n"
