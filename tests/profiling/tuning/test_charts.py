import xml.etree.ElementTree as ET

import pytest

from fastvar.profiling.tuning.charts import HEIGHT, WIDTH, Line, Point, log_lines, scatter

SVG = "{http://www.w3.org/2000/svg}"
LEGEND = ("front", "others")


def marks(text: str) -> dict[str, tuple[float, float]]:
    """Label -> where it is drawn; y upwards."""
    found = ET.fromstring(text).iter(f"{SVG}circle")
    return {m.find(f"{SVG}title").text: (float(m.get("cx")), HEIGHT - float(m.get("cy"))) for m in found}


def texts(text: str) -> list[str]:
    return [element.text for element in ET.fromstring(text).iter(f"{SVG}text")]


def test_points_lie_where_their_values_say():
    points = [Point(1, 20, "a", True), Point(2, 30, "b <&>", True), Point(3, 25, "c")]
    found = marks(scatter("t", "x", "y", points, LEGEND))
    (ax, ay), (bx, by), (cx, cy) = (found[point.label] for point in points)
    assert bx - ax == pytest.approx(cx - bx, abs=0.2)
    assert by - ay == pytest.approx(2 * (by - cy), abs=0.2)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in found.values())


def test_the_front_line_never_falls():
    points = [Point(1, 20, "a", True), Point(2, 10, "lower", True), Point(3, 30, "b", True), Point(2.5, 40, "beaten")]
    drawn = scatter("t", "x", "y", points, LEGEND)
    (line,) = ET.fromstring(drawn).iter(f"{SVG}polyline")
    joined = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
    places = marks(drawn)
    assert [(x, HEIGHT - y) for x, y in joined] == [places["a"], places["b"]]


def test_titles_axes_and_names_are_written():
    drawn = scatter("a title", "time", "dB", [Point(1, 20, "one", named=True), Point(2, 30, "two")], LEGEND)
    assert {"a title", "time", "dB", "one", *LEGEND} <= set(texts(drawn))
    assert "two" not in texts(drawn)


@pytest.mark.parametrize("points", [[Point(1, 20, "a")], [Point(1, 20, "a"), Point(1, 20, "b")], [Point(0, 0, "a")]])
def test_a_single_place_is_no_trouble(points: list[Point]):
    assert "a" in marks(scatter("t", "x", "y", points, LEGEND))


def test_a_power_law_is_a_straight_line():
    drawn = log_lines("t", "x", "y", [Line("squares", [(x, x**2) for x in (1, 10, 1000)])])
    (ax, ay), (bx, by), (cx, cy) = sorted(marks(drawn).values())
    assert (cx - bx) == pytest.approx(2 * (bx - ax), abs=0.3)
    assert (cy - by) == pytest.approx(2 * (by - ay), abs=0.3)


def test_ticks_are_named_and_what_was_not_measured_is_dashed():
    lines = [Line("measured", [(4, 1.0), (9, 20_000.0)]), Line("planned", [(4, 2.0)], dashed=True)]
    drawn = log_lines("t", "x", "y", lines, lambda x: f"{x**0.5:g}²")
    assert {"2²", "3²", "10 k", "measured", "planned"} <= set(texts(drawn))
    assert ["dashed" in line.get("class") for line in ET.fromstring(drawn).iter(f"{SVG}polyline")] == [False, True]
