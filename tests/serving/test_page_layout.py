"""How the page looks and reads: on a desktop and a phone, light and dark, without a mouse, by axe-core's rules."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.browser import DESKTOP, PHONE, ask, drawn, go_on, held, hold, opened, settled, state
from tests.serving.processes import Served

pytestmark = [pytest.mark.slow, pytest.mark.browser]
SEEN = {"desktop": DESKTOP, "phone": PHONE}
TOUCHED = "button:visible, a.button:visible, summary:visible, input:visible, select:visible, textarea:visible"


def through(page: Any) -> Any:
    """The states of the page one after the other, by name."""
    yield "empty"
    hold(page, 5)
    ask(page, seed=7)
    held(page)
    yield "drawing"
    go_on(page)
    drawn(page)
    yield "finished"
    ask(page, tau=0)
    page.locator("#e-tau:visible").wait_for()
    yield "error"
    ask(page, tau="", seed="", n=2)
    state(page, "2 images finished")
    yield "several"
    page.route("**/v1/images/generations", lambda route: route.abort())
    ask(page)
    page.locator("#notice:visible").wait_for()
    yield "notice"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", SEEN)
def test_nothing_overflows(browser, server: Served, tmp_path: Path, device: str, scheme: str):
    papers = set()
    with opened(browser, server.url, ["ERR_"], color_scheme=scheme, **SEEN[device]) as page:
        settled(page)
        page.click("summary")
        for name in through(page):
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width == SEEN[device]["viewport"]["width"], name
            path = tmp_path / f"{device}-{scheme}-{name}.png"
            page.screenshot(path=path, full_page=True)
            with Image.open(path) as shot:
                papers.add(shot.convert("L").getpixel((2, 2)) > 128)
                assert len(shot.convert("RGB").getcolors(1 << 24)) > 50
    assert papers == {scheme == "light"}


def test_a_finger_hits_what_is_there(browser, server: Served):
    with opened(browser, server.url, ["ERR_"], **PHONE) as page:
        settled(page)
        page.click("summary")
        for name in through(page):
            for one in page.locator(TOUCHED).all():
                box = one.bounding_box()
                assert box["height"] >= 44, (name, one.inner_html())
                assert box["width"] >= 44, (name, one.inner_html())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, server: Served, scheme: str):
    pytest.importorskip("axe_playwright_python", reason="axe-core is not installed: make test-browser")
    rules = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    with opened(browser, server.url, ["ERR_"], color_scheme=scheme) as page:
        settled(page)
        page.click("summary")
        page.evaluate(rules)
        for name in through(page):
            found = page.evaluate("axe.run()")
            assert len(found["passes"]) > 10
            serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
            told = [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious]
            assert told == [], name


def test_axe_does_find_faults(browser, server: Served):
    pytest.importorskip("axe_playwright_python", reason="axe-core is not installed: make test-browser")
    rules = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    with opened(browser, server.url) as page:
        page.evaluate(rules)
        page.evaluate("document.querySelectorAll('label').forEach((label) => label.remove())")
        assert "label" in [one["id"] for one in page.evaluate("axe.run()")["violations"]]


def test_who_wants_no_motion_gets_none(browser, server: Served):
    moves = "getComputedStyle(document.querySelector('#state i')).animationName"
    found = []
    for motion in ("reduce", "no-preference"):
        with opened(browser, server.url, reduced_motion=motion) as page:
            settled(page)
            hold(page, 2)
            ask(page)
            held(page)
            found.append(page.evaluate(moves))
    assert found == ["none", "pulse"]


def test_focus_is_seen(page):
    for _ in range(4):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
    page.focus("#draw")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "f-model"
