"""The page as a browser would take it apart: well-formed, alone, escaped, and readable without seeing it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastvar.profiling.records import KeptMap, Profile
from fastvar.profiling.report import kept_images, plots
from fastvar.profiling.report.page import HALF, NARROW, WIDE, report
from fastvar.profiling.samples import Recording
from tests.profiling.conftest import PROMPT

VOID = {"meta", "img", "br", "link", "input", "hr"}
MIB = 1 << 20


class Page(HTMLParser):
    """Every element with its attributes and the text directly in it; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[int] = []
        self.elements: list[dict] = []
        self.feed(text)
        self.close()
        assert self.open == [], "an element is never closed"

    def handle_starttag(self, tag, attrs):
        parent = self.open[-1] if self.open else None
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.elements.append({"tag": tag, "attrs": dict(attrs), "text": "", "parent": parent})
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        found = self.elements[self.open.pop()]["tag"]
        assert found == tag, f"</{tag}> closes <{found}>"

    def handle_data(self, data):
        if self.open:
            self.elements[self.open[-1]]["text"] += data

    def all(self, tag: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] == tag]

    def children(self, element: dict) -> list[dict]:
        index = self.elements.index(element)
        return [child for child in self.elements if child["parent"] == index]

    @property
    def text(self) -> str:
        hidden = ("style", "script")
        return " ".join(element["text"] for element in self.elements if element["tag"] not in hidden)


def alone(profile: Profile) -> Profile:
    return replace(profile, against=None)


@pytest.fixture(scope="module", params=["against another", "alone"])
def shown(request: pytest.FixtureRequest, measured: Profile) -> Profile:
    return measured if request.param == "against another" else alone(measured)


@pytest.fixture(scope="module")
def source(shown: Profile) -> str:
    return report(shown)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_nothing_comes_from_outside(page: Page, source: str):
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]+", "", source))
    for element in page.elements:
        assert element["tag"] not in ("link", "script", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "action"):
            assert element["attrs"].get(name, "data:").startswith("data:")
    policy = next(e["attrs"] for e in page.all("meta") if e["attrs"].get("http-equiv"))
    assert "default-src 'none'" in policy["content"]


def test_what_the_user_wrote_is_text(page: Page, source: str):
    assert page.all("b") == [b for b in page.all("b") if page.elements[b["parent"]]["tag"] == "figcaption"]
    assert "<b>red" not in source
    prompt = next(e for e in page.all("p") if e["attrs"].get("class") == "prompt")
    assert prompt["text"] == f"“{PROMPT}”"


def test_a_hostile_label_and_path_are_text(measured: Profile):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    facts = {**measured.subject.facts, "path": evil, "model": evil}
    settings = {**measured.settings, "prompt": evil}
    subject = replace(measured.subject, label=evil, facts=facts)
    page = Page(report(replace(measured, settings=settings, subject=subject)))
    assert page.all("script") == []
    assert all("onerror" not in e["attrs"] for e in page.elements)
    assert page.text.count(evil) > 5


def test_every_plot_has_a_title_for_those_who_do_not_see_it(page: Page, shown: Profile):
    drawn = page.all("svg")
    assert len(drawn) == 2 * (1 + 2 * len(shown.bundles)), "each for wide and for narrow screens"
    for svg in drawn:
        first = page.children(svg)[0]
        assert svg["attrs"]["role"] == "img"
        assert first["tag"] == "title"
        assert len(first["text"]) > 10
    for image in page.all("img"):
        assert image["attrs"]["alt"]
    for table in page.all("table"):
        assert page.children(table)[0]["tag"] == "caption"
        assert page.elements[table["parent"]]["attrs"]["class"] == "box", "it scrolls inside its own box"


def test_structure(page: Page):
    assert page.elements[0]["attrs"] == {"lang": "en"}
    assert len(page.all("h1")) == len(page.all("main")) == 1
    headings = [e["text"] for e in page.all("h2")]
    assert headings == [
        *("Latency per scale", "Where the time goes", "Memory over time"),
        *("What was kept where", "All figures", "How it was measured"),
    ]
    assert any(e["attrs"].get("name") == "viewport" for e in page.all("meta"))
    assert "prefers-color-scheme: dark" in page.all("style")[0]["text"]


def test_figures_are_those_of_the_profile(page: Page, shown: Profile):
    text = page.text
    assert shown.environment["cpu"] in text
    assert f"{shown.settings['runs']} whole images after 1 to warm up" in text
    assert "below the budget of 64.00 GiB" in text
    assert shown.subject.memory.recording.peak.source in text
    assert ("faster than" in text or "of the speed of" in text) == (shown.against is not None)
    rows = [row for table in page.all("tbody") for row in page.children(table)]
    assert len(rows) == sum(len(bundle.stages) + len(bundle.engines) for bundle in shown.bundles)


def test_a_scale_that_one_bundle_leaves_out(measured: Profile):
    stages = tuple(row for row in measured.subject.stages if row.scale != 2)
    found = plots.latency(replace(measured, subject=replace(measured.subject, stages=stages)), WIDE, "wide")
    assert found.count("skipped") == 1
    assert "4×4" in found  # noqa: RUF001


def test_a_busy_machine_is_told(measured: Profile):
    calm, busy = (
        {**measured.subject.totals, "image": replace(measured.subject.totals["image"], median=10.0, p95=p95)}
        for p95 in (14.0, 16.0)
    )
    for totals, told in ((calm, False), (busy, True)):
        shown = replace(measured, subject=replace(measured.subject, totals=totals), against=None)
        assert ("Runs differed widely" in report(shown)) == told


@pytest.mark.parametrize(("budget", "told"), [(1.5, "over the budget"), (3.0, "below the budget")])
def test_a_budget_is_drawn(measured: Profile, budget: float, told: str):
    peak = replace(measured.subject.memory.recording.peak, size_bytes=2 * 100 * MIB)
    samples = tuple(replace(s, process_bytes=min(s.process_bytes, 150 * MIB)) for s in _samples(measured))
    recording = Recording(samples, peak, int(budget * 100 * MIB))
    memory = replace(measured.subject.memory, recording=recording)
    page = Page(report(replace(measured, subject=replace(measured.subject, memory=memory), against=None)))
    assert told in page.text
    assert "beyond this axis" not in page.text
    lines = [e["attrs"] for e in page.all("line") if e["attrs"]["class"] in ("budget-line", "peak-line")]
    heights = {line["class"]: float(line["y1"]) for line in lines}
    assert (heights["budget-line"] > heights["peak-line"]) == (budget < 2), "lower on the page is less"


def _samples(profile: Profile):
    return profile.subject.memory.recording.samples


@pytest.mark.parametrize("width", [WIDE, HALF, NARROW])
def test_nothing_is_drawn_outside_of_a_plot(measured: Profile, width: float):
    drawn = [plots.latency(measured, width, "wide")]
    for bundle in measured.bundles:
        drawn += [plots.cumulative(bundle, width, "wide"), plots.memory(bundle, 300 * MIB, width, "wide")]
    for svg in drawn:
        page = Page(svg)
        height = float(page.elements[0]["attrs"]["height"])
        for element in page.elements:
            for name, limit in (("x", width), ("x1", width), ("x2", width), ("y", height), ("y1", height)):
                assert 0 <= float(element["attrs"].get(name, 0)) <= limit, element
            if element["tag"] == "rect":
                a = element["attrs"]
                assert float(a["x"]) + float(a["width"]) <= width + 0.6


def test_shares_of_kinds_are_drawn_one_behind_the_other(measured: Profile):
    page = Page(plots.cumulative(measured.subject, HALF, "wide"))
    bars = [e["attrs"] for e in page.all("rect") if e["attrs"]["class"] == "subject"]
    track = next(e["attrs"] for e in page.all("rect") if e["attrs"]["class"] == "track")
    end = float(track["x"])
    for bar in bars:
        assert float(bar["x"]) == pytest.approx(end, abs=2), "the thinnest bars are drawn half a pixel wide"
        end = float(bar["x"]) + float(bar["width"])
    assert end == pytest.approx(float(track["x"]) + float(track["width"]), abs=2)
    assert sum(share for _, share in plots.kind_shares(measured.subject)) == pytest.approx(1)


# Heat maps


def decoded(uri: str) -> np.ndarray:
    kind, data = uri.split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def png(size: tuple[int, int], level: int = 128) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, "PNG")
    return file.getvalue()


def test_each_cell_covers_its_part_of_the_image():
    kept = KeptMap(6, (2, 3), 3, 4, ((0, 4, 1), (2, 0, 3)))
    found = decoded(kept_images.heat_map(png((30, 20)), kept))
    assert found.shape == (20, 30, 3)
    cells = found.reshape(2, 10, 3, 10, 3)
    assert (cells == cells[:, :1, :, :1]).all(), "one colour a cell"
    bright = cells[:, 0, :, 0].astype(int).sum(-1)
    order = np.argsort(bright, axis=None, kind="stable")
    assert np.array(kept.counts).ravel()[order].tolist() == sorted(np.array(kept.counts).ravel())
    assert (cells[0, 0, 0, 0] == round(kept_images.DIMMED * 128)).all(), "kept by none: the image, darker"


def test_large_images_are_reduced():
    assert decoded(kept_images.picture(png((2048, 1024)))).shape == (256, 512, 3)
    assert decoded(kept_images.picture(png((256, 256)))).shape == (256, 256, 3)
