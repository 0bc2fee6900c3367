"""The SVG writer of all plots: elements, axes, and the frame that data lies in.

Colours are classes of a style sheet: the page's, or the plot's own if it is a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

CHARACTER = 6.6  # approximate width of a character in pixels

XY = tuple[float, float]


class Canvas:
    """Elements of one plot; all text is escaped.

    `title` describes the plot to screen readers; `tip` is shown while the pointer rests on an element.

    Args:
        sheet: CSS of a plot that is a file; "" for a plot inside a page.
    """

    def __init__(self, width: float, height: float, title: str, kind: str = "plot", sheet: str = "") -> None:
        self.width, self.height = width, height
        size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
        alone = ' xmlns="http://www.w3.org/2000/svg"' if sheet else ""
        self._parts = [f'<svg class="{kind}" role="img" {size}{alone}>', f"<title>{escape(title)}</title>"]
        if sheet:
            self._parts.append(f"<style>{sheet}</style>")

    def rect(self, x: float, y: float, width: float, height: float, style: str, tip: str = "", round: int = 2) -> None:
        self._add("rect", style, tip, x=x, y=y, width=max(width, 0.5), height=height, rx=round)

    def line(self, start: XY, end: XY, style: str, tip: str = "") -> None:
        self._add("line", style, tip, x1=start[0], y1=start[1], x2=end[0], y2=end[1])

    def polyline(self, points: Sequence[XY], style: str) -> None:
        self._add("polyline", style, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def circle(self, centre: XY, radius: float, style: str, tip: str = "") -> None:
        self._add("circle", style, tip, cx=centre[0], cy=centre[1], r=radius)

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start", **more: str) -> None:
        self._add("text", style, text=text, x=x, y=y, text_anchor=anchor, **more)

    def _add(self, element: str, style: str, tip: str = "", text: str = "", **attributes: float | str) -> None:
        """Numbers are pixels."""
        given = {name: value if isinstance(value, str) else f"{value:.1f}" for name, value in attributes.items()}
        written = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in given.items())
        inside = f"<title>{escape(tip)}</title>" if tip else escape(text)
        self._parts.append(f'<{element} class="{style}"{written}>{inside}</{element}>')

    def svg(self) -> str:
        return "\n".join((*self._parts, "</svg>\n"))


def text_width(text: str) -> float:
    """Approximate pixels."""
    return CHARACTER * len(text)


@dataclass(frozen=True)
class Axis:
    """The range of one axis, its ticks and their names."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    name: Callable[[float], str] = "{:g}".format
    logarithmic: bool = False

    def part(self, value: float) -> float:
        """Position of a value: 0 at the low end, 1 at the high end."""
        low, at, high = (math.log(v) if self.logarithmic else v for v in (self.low, value, self.high))
        return (at - low) / (high - low)


def round_ticks(low: float, high: float) -> list[float]:
    """About five ticks at multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Frame:
    """The rectangle between two axes, in pixels."""

    left: float
    top: float
    width: float
    height: float
    x: Axis
    y: Axis

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def place(self, x: float, y: float) -> XY:
        return self.left + self.width * self.x.part(x), self.bottom - self.height * self.y.part(y)

    def draw(self, canvas: Canvas) -> None:
        """Horizontal grid lines, the names of all ticks, and the title of the horizontal axis."""
        for tick in self.y.ticks:
            y = self.place(self.x.low, tick)[1]
            canvas.line((self.left, y), (self.right, y), "grid")
            canvas.text(self.left - 7, y + 4, self.y.name(tick), "muted small", "end")
        for tick in self.x.ticks:
            canvas.text(self.place(tick, self.y.low)[0], self.bottom + 17, self.x.name(tick), "muted small", "middle")
        canvas.text(self.right, self.bottom + 34, self.x.title, "muted small", "end")
