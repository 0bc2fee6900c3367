"""Debian's Chromium, driven by playwright, on the server's page; and what a user does there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DONE_MS = 120_000  # an image, on a machine that is busy with other tests
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
REFUSED = r"Failed to load resource: the server responded with a status of 4\d\d"

# Holds the server's stream after so many events, until `goOn()`: what comes and goes in milliseconds can be looked at.
# Tells how often the picture and the live region changed.
WATCHED = """
window.heldAfter = Infinity;
const fetched = window.fetch;
window.fetch = async (...given) => {
  const response = await fetched(...given);
  if (!response.ok || !response.headers.get("content-type").startsWith("text/event-stream")) return response;
  const decoder = new TextDecoder(), encoder = new TextEncoder();
  let text = "", seen = 0;
  const transform = async (part, out) => {
    if (window.heldAfter === Infinity && !text) return out.enqueue(part);
    text += decoder.decode(part, { stream: true });
    for (let end; (end = text.indexOf("\\n\\n")) >= 0; text = text.slice(end + 2)) {
      if (text.startsWith("event") && seen++ === window.heldAfter) {
        document.documentElement.dataset.held = "";
        await new Promise((goOn, giveUp) => {
          window.goOn = goOn;
          given[1].signal.addEventListener("abort", () => giveUp(given[1].signal.reason));
        });
        delete document.documentElement.dataset.held;
      }
      out.enqueue(encoder.encode(text.slice(0, end + 2)));
    }
  };
  return new Response(response.body.pipeThrough(new TransformStream({ transform })), response);
};
window.painted = [];
window.told = [];
document.addEventListener("DOMContentLoaded", () => {
  const told = document.querySelector("[role=status]");
  new MutationObserver(() => window.told.push(told.textContent)).observe(told, { childList: true });
  new MutationObserver((changes) => {
    for (const { target } of changes) if (target.matches(".canvas img")) window.painted.push(target.src);
  }).observe(document.body, { subtree: true, attributeFilter: ["src"] });
});
"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test where there is none."""
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip(f"no {' or '.join(CHROMIUM)} on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, ignores: Sequence[str] = (), **options: Any) -> Iterator[Page]:
    """The page of a server. Fails where it asks another one, or where its console has anything but what `ignores`
    matches. That an answer was a 4xx Chromium tells there as well.
    """
    context = browser.new_context(**{**DESKTOP, **options})
    context.add_init_script(WATCHED)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    fine = re.compile("|".join((REFUSED, *ignores)))
    page.on("console", lambda line: None if fine.search(line.text) else wrong.append(f"{line.type}: {line.text}"))
    page.on("request", lambda one: None if one.url.startswith((url, "data:", "blob:")) else wrong.append(one.url))
    page.goto(url)
    try:
        yield page
        assert wrong == []
    finally:
        context.close()


def settled(page: Page) -> None:
    """Wait until the page knows the models."""
    page.locator("#facts", has_text="scales").wait_for()


def ask(page: Page, prompt: str = "a red circle above a blue square", **fields: object) -> None:
    """Fill in the form, and draw."""
    page.fill("#f-prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#f-{name}", str(value))
    page.click("#draw")


def hold(page: Page, events: int) -> None:
    """The next stream stops after so many events."""
    page.evaluate(f"heldAfter = {events}")


def held(page: Page) -> None:
    page.locator("html[data-held]").wait_for(state="attached", timeout=DONE_MS)


def go_on(page: Page) -> None:
    page.evaluate("heldAfter = Infinity; goOn()")


def state(page: Page, text: str) -> None:
    """Wait for what the page says of its state."""
    page.locator("#told", has_text=text).wait_for(timeout=DONE_MS)


def drawn(page: Page) -> None:
    """Wait until the image is finished."""
    page.locator("#pictures[aria-busy=false] .settings").first.wait_for(timeout=DONE_MS)


def saved(page: Page, folder: Path) -> bytes:
    """What the first button to download gives."""
    with page.expect_download() as download:
        page.locator("a[download]").first.click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path.read_bytes()
