"""A small SVG writer. Colours are classes of report.css, so that a plot is light or dark as its page is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CHARACTER = 6.6  # pixels that a character of the plots' text takes, roughly


class Canvas:
    """Elements of one plot; everything that is text is escaped.

    `title` names the plot to those who cannot see it; `tip` of an element is shown where the mouse rests on it.
    """

    def __init__(self, width: float, height: float, title: str, kind: str) -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg class="{kind}" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">',
            f"<title>{escape(title)}</title>",
        ]

    def rect(self, x: float, y: float, width: float, height: float, style: str, tip: str = "", round: int = 2) -> None:
        where = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" rx="{round}"'
        self._add("rect", f'class="{style}" {where}', tip)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str, tip: str = "") -> None:
        self._add("line", f'class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"', tip)

    def path(self, points: Sequence[tuple[float, float]], style: str, *, closed: bool = False) -> None:
        drawn = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self._add("path", f'class="{style}" d="M{drawn}{"Z" if closed else ""}"')

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self._parts.append(f'<text class="{style}" {where}>{escape(text)}</text>')

    def _add(self, element: str, attributes: str, tip: str = "") -> None:
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        self._parts.append(f"<{element} {attributes}>{inside}</{element}>")

    def svg(self) -> str:
        return "".join((*self._parts, "</svg>"))


def text_width(text: str) -> float:
    """Pixels, roughly."""
    return CHARACTER * len(text)
