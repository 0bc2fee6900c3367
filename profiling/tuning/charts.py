"""Two charts as SVG files: a scatter plot with a Pareto front, and lines over logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..report.svg import XY, Axis, Canvas, Frame, round_ticks

WIDTH, HEIGHT = 640, 440
LEFT, RIGHT, TOP, BOTTOM = 68, 18, 44, 52  # margins around the axes
COLOURS = ("#1f6fb4", "#d1600a", "#2a8a3e", "#8a3ea8", "#b02a37")  # they differ in lightness too
FRONT, FAINT = "series0", "faint"
MARK = 4.5  # radius
SHEET = """
text { font: 12.5px Helvetica, Arial, sans-serif; fill: #222222; }
.heading { font-size: 15px; font-weight: bold; }
.halo { stroke: #ffffff; stroke-width: 3px; paint-order: stroke; }
.paper { fill: #ffffff; }
.grid { stroke: #e4e4e4; }
.axis { stroke: #222222; }
polyline, .key { fill: none; stroke: currentColor; stroke-width: 2px; }
.dashed { stroke-dasharray: 6 4; }
circle { fill: currentColor; stroke: #ffffff; }
.faint { color: #9aa5b1; }
""" + "".join(f".series{number} {{ color: {colour}; }}\n" for number, colour in enumerate(COLOURS))


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot. The label is its tip, and stands beside it if `named`."""

    x: float
    y: float
    label: str = ""
    on_front: bool = False
    named: bool = False


@dataclass(frozen=True)
class Line:
    """Points joined in order, in the colour of that number; `dashed` for figures that were not measured."""

    label: str
    points: Sequence[XY]
    colour: int = 0
    dashed: bool = False

    @property
    def series(self) -> str:
        return f"series{self.colour % len(COLOURS)}"

    @property
    def style(self) -> str:
        return f"{self.series} dashed" if self.dashed else self.series


def scatter(title: str, x_title: str, y_title: str, points: Sequence[Point], legend: tuple[str, str]) -> str:
    """Points, and a rising line through the points on the front.

    Args:
        legend: labels of points on the front and of all others.
    """
    x, y = _linear_axis(x_title, [p.x for p in points]), _linear_axis(y_title, [p.y for p in points])
    canvas, frame = _chart(title, x, y, [(legend[0], FRONT), (legend[1], FAINT)])
    canvas.polyline([frame.place(p.x, p.y) for p in _rising([p for p in points if p.on_front])], FRONT)
    for point in sorted(points, key=lambda p: p.on_front):  # the front on top
        canvas.circle(frame.place(point.x, point.y), MARK, FRONT if point.on_front else FAINT, point.label)
    _names(canvas, [(frame.place(p.x, p.y), p.label) for p in points if p.named])
    return canvas.svg()


def log_lines(
    title: str, x_title: str, y_title: str, lines: Sequence[Line], x_names: Callable[[float], str] = "{:g}".format
) -> str:
    """Lines over two logarithmic axes. The ticks of the horizontal axis are the points' values, named by `x_names`."""
    xs = sorted({x for line in lines for x, _ in line.points})
    x = Axis(x_title, xs[0] / 1.15, xs[-1] * 1.15, xs, x_names, logarithmic=True)
    y = _log_axis(y_title, [y for line in lines for _, y in line.points])
    canvas, frame = _chart(title, x, y, [(line.label, line.style) for line in lines])
    for line in lines:
        canvas.polyline([frame.place(*point) for point in line.points], line.style)
        for a, b in line.points:
            canvas.circle(frame.place(a, b), MARK, line.series, f"{line.label}: {b:,.4g} at {x_names(a)}")
    return canvas.svg()


def _rising(points: Sequence[Point]) -> list[Point]:
    """A front has more than two criteria, so that some of its points lie under its line in the plane shown."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not kept or point.y > kept[-1].y:
            kept.append(point)
    return kept


def _linear_axis(title: str, values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    low, high = low - margin, high + margin
    return Axis(title, low, high, round_ticks(low, high), _short)


def _log_axis(title: str, values: Sequence[float]) -> Axis:
    low, high = min(values) / 1.4, max(values) * 1.4
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return Axis(title, low, high, [tick for tick in ticks if low <= tick <= high], _short, logarithmic=True)


def _short(value: float) -> str:
    """12000 -> "12 k"."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):g}{unit}"
    return f"{value:g}"


def _chart(title: str, x: Axis, y: Axis, legend: Sequence[tuple[str, str]]) -> tuple[Canvas, Frame]:
    """Paper, heading, grid, axes, and the legend: labels with their styles."""
    canvas = Canvas(WIDTH, HEIGHT, title, sheet=SHEET)
    frame = Frame(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, x, y)
    canvas.rect(0, 0, WIDTH, HEIGHT, "paper", round=0)
    canvas.text(LEFT, 20, title, "heading")
    for tick in x.ticks:
        at = frame.place(tick, y.low)[0]
        canvas.line((at, TOP), (at, frame.bottom), "grid")
    frame.draw(canvas)
    corner = (LEFT, frame.bottom)
    canvas.line(corner, (frame.right, frame.bottom), "axis")
    canvas.line(corner, (LEFT, TOP), "axis")
    middle = TOP + frame.height / 2
    canvas.text(16, middle, y.title, "", "middle", transform=f"rotate(-90 16 {middle:.1f})")
    at = float(LEFT)
    for label, style in legend:
        canvas.line((at, TOP - 10), (at + 20, TOP - 10), f"key {style}")
        canvas.text(at + 25, TOP - 6, label)
        at += 40 + 6.4 * len(label)
    return canvas, frame


def _names(canvas: Canvas, named: Iterable[tuple[XY, str]]) -> None:
    """Labels beside points, on the side with room, clear of the labels before them."""
    taken: list[XY] = []
    for (x, y), label in sorted(named):
        leftward = x > WIDTH * 0.62
        at = (x - 8, y - 8) if leftward else (x + 8, y + 15)  # clear of a rising front
        while any(abs(at[0] - other[0]) < 7 * len(label) and abs(at[1] - other[1]) < 13 for other in taken):
            at = (at[0], at[1] + (-13 if leftward else 13))
        taken.append(at)
        canvas.text(*at, label, "halo", "end" if leftward else "start")
