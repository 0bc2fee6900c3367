"""Draws the curves of all stages into one SVG: `python -m demo.training.plot`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from demo.training.curve import read
from demo.training.places import CURVES, STATES
from fastvar.profiling.report.svg import XY, Axis, Canvas, Frame, round_ticks

PANEL, GAP, LEFT, TOP = (420.0, 230.0), 70.0, 60.0, 56.0  # pixels
PER_ROW = 2
COLORS = ("#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5", "#e67700", "#0c8599", "#c2255c", "#5f3dc4", "#66a80f", "#495057")
SHEET = "\n".join(
    (
        "text { font: 12px sans-serif; fill: #222 } .small { font-size: 11px } .muted { fill: #666 }",
        ".title { font-size: 14px; font-weight: bold } .grid { stroke: #ddd }",
        *(f".line{i} {{ fill: none; stroke: {c}; stroke-width: 1.5 }} .name{i} {{ fill: {c}; font-size: 11px }}"
          for i, c in enumerate(COLORS)),
    )
)  # fmt: skip

Series = dict[str, list[XY]]  # column -> (step, value)


def series_of(file: Path) -> Series:
    """Every column of a curve that is a loss; decibels and shares would need axes of their own."""
    rows, found = read(file), {}
    for name in rows[0] if rows else ():
        points = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
        if name not in ("step", "cpu_s") and points and not name.startswith(MEASURED):
            found[name] = points
    return found


MEASURED = ("psnr", "decoder_psnr", "round_trip", "overall", "shape")


def panel(canvas: Canvas, corner: XY, title: str, series: Series) -> None:
    """One stage: losses over steps, on a logarithmic axis."""
    values = [y for points in series.values() for _, y in points if y > 0]
    steps = [x for points in series.values() for x, _ in points]
    low, high = min(values) / 1.05, max(values) * 1.05
    last = max(*steps, 1.0)
    frame = Frame(
        *corner,
        *PANEL,
        Axis("step", 0, last, round_ticks(0, last)),
        Axis("loss", low, high, logarithmic_ticks(low, high), logarithmic=True),
    )
    canvas.text(corner[0], corner[1] - 14, title, "title")
    frame.draw(canvas)
    for i, (name, points) in enumerate(series.items()):
        placed = [frame.place(x, y) for x, y in points if y > 0]
        canvas.polyline(placed, f"line{i % len(COLORS)}")
        canvas.text(frame.right + 6, corner[1] + 12 + 14 * i, name, f"name{i % len(COLORS)}")


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two positive numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [round(factor * 10.0**power, 9) for power in powers for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def draw(files: Sequence[Path]) -> str:
    """All stages as an SVG; a stage without a row is left out."""
    stages = [(file.stem.replace("_", " "), series) for file in files if (series := series_of(file))]
    width, height = PANEL[0] + LEFT + GAP, PANEL[1] + TOP + GAP
    rows = -(-len(stages) // PER_ROW)
    canvas = Canvas(PER_ROW * width, max(rows, 1) * height, "losses of the demo's training", sheet=SHEET)
    for i, (title, series) in enumerate(stages):
        corner = LEFT + i % PER_ROW * width, TOP + i // PER_ROW * height
        panel(canvas, corner, title, series)
    return canvas.svg()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curves", type=Path, default=CURVES, help="folder of the CSVs")
    parser.add_argument("--out", type=Path, default=STATES / "training.svg", help="where the plot goes")
    arguments = parser.parse_args()
    arguments.out.write_text(draw(sorted(arguments.curves.glob("*.csv"))))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
