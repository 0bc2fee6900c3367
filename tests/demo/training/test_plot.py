import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from demo.training.curve import Curve
from demo.training.plot import draw, logarithmic_ticks, series_of


def _curves(folder: Path) -> list[Path]:
    for name, columns in (("decoder", ("256", "512", "round_trip_256")), ("transformer", ("scale_0", "overall_256"))):
        curve = Curve(folder / f"{name}.csv", columns, 0)
        for step in (10, 20, 30):
            curve.add(dict.fromkeys(columns, 1 / step))
            curve.write(step, 1.0)
    Curve(folder / "encoder.csv", ("256",), 0)
    return sorted(folder.glob("*.csv"))


def test_losses_are_drawn_and_measurements_are_not(tmp_path: Path):
    files = _curves(tmp_path)
    assert list(series_of(tmp_path / "decoder.csv")) == ["256", "512"]
    assert series_of(tmp_path / "decoder.csv")["256"] == [(10, 0.1), (20, 0.05), (30, 0.0333)]
    root = ET.fromstring(draw(files))
    lines = root.findall("{*}polyline")
    assert len(lines) == 3
    titles = [text.text for text in root.findall("{*}text") if text.get("class") == "title"]
    assert titles == ["decoder", "transformer"]  # the encoder has no row
    heights = [float(point.split(",")[1]) for point in lines[0].get("points", "").split()]
    assert heights == sorted(heights)  # a falling loss goes down: y grows downwards


def test_ticks_of_a_logarithmic_axis():
    assert logarithmic_ticks(0.03, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
