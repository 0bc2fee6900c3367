"""The page at `/`, in a browser, on a real server: what is drawn, stopped, tried again, saved, and told of errors."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.browser import ask, drawn, go_on, held, hold, opened, saved, settled, state
from tests.serving.processes import Served, paced, serving

pytestmark = [pytest.mark.slow, pytest.mark.browser]
SIDES = (1, 2, 4, 6, 8, 12, 16)  # of the scales, in tokens
TIMES = "\N{MULTIPLICATION SIGN}"
PACE = 0.1  # seconds a scale, of servers that take their time
PROMPT = "a red circle above a blue square"


def post(url: str, **fields: object) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@contextmanager
def crowd(served: Served, requests: int) -> Iterator[None]:
    """Within the block so many requests of others are before the next one, of ten images each."""
    many = {"prompt": PROMPT, "n": 10}
    threads = [threading.Thread(target=post, args=[served.url], kwargs=many, daemon=True) for _ in range(requests)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_for(lambda expected=number: gauge(served, "running") > 0 and gauge(served, "queue_length") >= expected)
    yield
    for thread in threads:
        thread.join(120)


def wait_for(found: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def gauge(served: Served, name: str, stage: str = "") -> float:
    """A figure of the server, summed over its labels."""
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found = (line for line in lines if line.startswith(f"fastvar_{name}{{") and stage in line)
    return sum(float(line.rpartition(" ")[2]) for line in found)


def frames(page: Any, picture: int = 0) -> list[str]:
    return page.locator(".picture").nth(picture).locator(".frames button:enabled").all_inner_texts()


# Drawing


def test_every_scale_is_shown(page, server: Served, tmp_path: Path):
    hold(page, 6)
    ask(page, seed=7)
    held(page)
    assert page.locator("#detail").inner_text() == "scale 6 of 7"
    assert len(frames(page)) == 6
    assert page.locator(".canvas img").evaluate("(image) => image.naturalWidth") == 256
    go_on(page)
    drawn(page)
    found = [re.sub(r"\s+", " ", text) for text in frames(page)]
    assert len(found) == 8
    for text, side in zip(found, SIDES, strict=False):
        kept = 64 if side == 16 else side * side
        assert re.search(rf"{side}{TIMES}{side}.* {kept}/{side * side}.* [\d.]+ m?s$", text), text
    assert len(set(page.evaluate("painted"))) == 8  # all of them, in the picture
    told = page.evaluate("told")
    assert told[0] == "Asking the server"
    assert told[-1].startswith("Finished after")
    assert len(told) <= 4  # no preview is read out


def test_the_download_is_the_file_that_the_server_sends(page, server: Served, tmp_path: Path):
    ask(page, seed=7, guidance_scale="4", negative_prompt="green")
    drawn(page)
    file = saved(page, tmp_path)
    sent = post(server.url, prompt=PROMPT, seed=7, guidance_scale=4, negative_prompt="green")
    assert file == base64.b64decode(sent["data"][0]["b64_json"])
    text = Image.open(io.BytesIO(file)).text
    assert (text["prompt"], text["seed"]) == (PROMPT, "7")
    settings = json.loads(text["settings"])
    assert (settings["guidance_scale"], settings["negative_prompt"]) == (4.0, "green")


def test_the_same_seed_again_and_a_new_one(page, tmp_path: Path):
    ask(page)
    drawn(page)
    first, seed = saved(page, tmp_path), page.locator(".settings dd").first.inner_text()
    page.click("text=Same seed again")
    drawn(page)
    assert page.input_value("#f-seed") == seed
    assert saved(page, tmp_path) == first
    page.click("text=New seed")
    drawn(page)
    assert page.input_value("#f-seed") == ""
    assert page.locator(".settings dd").first.inner_text() != seed
    assert page.locator("#strip button").count() == 3


def test_a_seed_keeps_all_its_digits(page, tmp_path: Path):
    seed = str(2**53 + 1)  # no float has it
    ask(page, seed=seed)
    drawn(page)
    assert page.locator(".settings dd").first.inner_text() == seed
    assert Image.open(io.BytesIO(saved(page, tmp_path))).text["seed"] == seed
    page.click("text=Same seed again")
    drawn(page)
    assert Image.open(io.BytesIO(saved(page, tmp_path))).text["seed"] == seed


def test_several_images_have_a_picture_each(page):
    ask(page, seed=5, n=3)
    state(page, "3 images finished")
    assert page.locator(".picture").count() == 3
    assert [len(frames(page, place)) for place in range(3)] == [8, 8, 8]
    seeds = [page.locator(".picture").nth(place).locator(".settings dd").first.inner_text() for place in range(3)]
    assert seeds == ["5", "6", "7"]
    assert page.locator("#strip button").count() == 3


def test_an_image_of_the_strip_is_shown_again_with_its_settings(page):
    ask(page, seed=5, guidance_scale=2, negative_prompt="green")
    drawn(page)
    ask(page, "a blue square", seed="", guidance_scale="", negative_prompt="")
    drawn(page)
    page.locator("#strip button").nth(1).click()
    assert page.locator(".picture .quote").inner_text() == f"“{PROMPT}”"
    names = ("prompt", "seed", "guidance_scale", "negative_prompt", "n")
    assert [page.input_value(f"#f-{name}") for name in names] == [PROMPT, "5", "2", "green", "1"]
    assert page.locator("#strip button").nth(1).get_attribute("aria-current") == "true"


def test_a_scale_is_kept_in_the_picture(page):
    ask(page)
    drawn(page)
    page.locator(".frames button").nth(3).click()
    assert f"scale 4 of 7: 6{TIMES}6" in page.locator("figcaption").inner_text()
    page.locator(".frames button").nth(3).click()
    assert page.locator("figcaption").inner_text() == f"Finished image, 256{TIMES}256 pixels"


def test_a_model_of_classes_is_asked_for_classes(browser, var_editing_bundle: Path):
    with serving(var_editing_bundle) as served, opened(browser, served.url) as page:
        settled(page)
        assert not page.is_visible("#f-prompt")
        page.fill("#f-class_label", "99")
        page.press("#f-class_label", "Enter")
        page.locator("#e-class_label", has_text="class 99").wait_for()
        page.fill("#f-class_label", "3")
        page.press("#f-class_label", "Enter")
        drawn(page)
        assert page.locator(".picture .quote").inner_text() == "class 3"
        assert page.locator(".frames", has_text="left out").count() == 1  # a scale that the policy skips


# Stopping, waiting, trying again


@pytest.fixture(scope="module")
def paced_server(browser, demo_bundle: Path) -> Iterator[Served]:
    """Takes its time for every scale: no machine is fast enough to finish before a key is pressed."""
    with paced(demo_bundle, pace=PACE) as served:
        yield served


@pytest.fixture
def paced_page(browser, paced_server: Served) -> Iterator[Any]:
    with opened(browser, paced_server.url) as page:
        settled(page)
        yield page


def test_keys_draw_and_stop(paced_page, paced_server: Served):
    page, server = paced_page, paced_server
    page.fill("#f-prompt", PROMPT)
    page.fill("#f-n", "10")
    hold(page, 3)
    page.press("#f-prompt", "Control+Enter")
    held(page)
    before = gauge(server, "cancelled_total", stage="drawing")
    page.keyboard.press("Escape")
    state(page, "Stopped")
    wait_for(lambda: gauge(server, "cancelled_total", stage="drawing") > before)
    hold(page, 99)
    ask(page, n=1)
    drawn(page)


def test_stop_leaves_what_was_drawn(page):
    hold(page, 3)
    ask(page, n=2)
    held(page)
    page.click("#halt")
    state(page, "Stopped")
    assert "stopped here" in page.locator("figcaption").first.inner_text()
    assert len(frames(page)) == 3
    assert page.locator("#strip button").count() == 0
    assert page.evaluate("document.activeElement.id") == "draw"


def test_who_waits_sees_her_place_and_may_leave(paced_page, paced_server: Served):
    page, server = paced_page, paced_server
    with crowd(server, 2):
        ask(page)
        state(page, "Waiting: 2 ahead of you")
        assert [told for told in page.evaluate("told") if "ahead" in told] == ["Waiting: 2 ahead of you"]
        before = gauge(server, "cancelled_total", stage="queued")
        page.click("#halt")
        state(page, "Stopped")
        wait_for(lambda: gauge(server, "cancelled_total", stage="queued") > before)


def test_a_full_queue_is_counted_down(browser, demo_bundle: Path):
    with paced(demo_bundle, "--queue", "1", pace=PACE) as served, opened(browser, served.url) as page:
        settled(page)
        with crowd(served, 2):
            ask(page)
            page.locator("#notice-text", has_text="1 requests wait already").wait_for()
            page.locator("#again", has_text="Retry now, else in").wait_for()
            page.click("#dismiss")
            state(page, "Not asked again")
            assert not page.is_visible("#notice")
        ask(page)
        drawn(page)


def test_after_the_count_it_is_tried_again_once(page):
    error = {"message": "full\nfix: ask again in 1 s", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    asked = []

    def refuse(route: Any) -> None:
        asked.append(route.request.post_data)
        headers = {"retry-after": "1", "content-type": "application/json"}
        route.fulfill(status=429, headers=headers, body=json.dumps({"error": error}))

    page.route("**/v1/images/generations", refuse)
    ask(page, seed=9)
    page.locator("#again", has_text="Retry now, else in 1 s").wait_for()
    page.locator("#again", has_text=re.compile("^Retry$")).wait_for()
    assert asked[0] == asked[1]
    assert len(asked) == 2
    page.unroute("**/v1/images/generations")
    page.click("#again")
    drawn(page)
    assert not page.is_visible("#notice")


def test_a_lost_connection_is_told_and_tried_again(browser, demo_bundle: Path):
    with serving(demo_bundle) as served, opened(browser, served.url, ignores=["ERR_"]) as page:
        settled(page)
        hold(page, 2)
        ask(page, seed=3, n=10)
        held(page)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait(60)
        go_on(page)
        page.locator("#notice-text", has_text="The connection to the server was lost").wait_for()
        page.click("#again")
        page.locator("#told", has_text="Connection lost").wait_for()
        with serving(demo_bundle, "--port", served.url.rpartition(":")[2]):
            page.click("#again")
            state(page, "10 images finished")


def test_lines_may_end_as_a_proxy_likes(page):
    def rewrite(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.text().replace("\n", "\r\n"))

    page.route("**/v1/images/generations", rewrite)
    ask(page)
    drawn(page)
    assert len(frames(page)) == 8


# What went wrong


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", "abc", "expected: a whole number from 0"),
        ("seed", str(2**64), "expected: a whole number from 0"),
        ("guidance_scale", "3,5", "expected: a number from 0 to 100"),
        ("n", "11", "expected: a whole number from 1 to 10"),
        ("negative_prompt", "red " * 99, "fix: shorten the negative prompt"),
        ("tau", "0", "expected: a number from 0.0001 to 100"),
    ],
)
def test_an_error_stands_by_its_field(page, field: str, value: str, message: str):
    if field == "tau":
        page.click("summary")
    page.fill(f"#f-{field}", value)
    page.evaluate("document.getElementById('further').open = false")
    ask(page)
    page.locator(f"#e-{field}", has_text=message).wait_for()
    control = page.locator(f"#f-{field}")
    assert control.get_attribute("aria-invalid") == "true"
    assert control.get_attribute("aria-describedby") == f"e-{field}"
    assert control.evaluate("(element) => element === document.activeElement")
    control.fill("1")
    assert not page.is_visible(f"#e-{field}")


def test_an_unknown_word_is_told(page):
    ask(page, "a red zeppelin")
    drawn(page)
    assert "zeppelin" in page.locator(".remark").inner_text()


def test_a_key_is_asked_for_when_it_is_needed(browser, demo_bundle: Path, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("right-key\n")
    with serving(demo_bundle, "--api-key-file", str(keys)) as served, opened(browser, served.url) as page:
        for key in ("wrong-key", "no key"):
            page.fill("#f-key", key)
            page.press("#f-key", "Enter")
            page.locator("#e-key:visible").wait_for()
        page.fill("#f-key", "right-key")
        page.click("text=Use this key")
        settled(page)
        assert not page.is_visible("#f-key")
        ask(page)
        drawn(page)
        page.reload()
        settled(page)
        assert not page.is_visible("#f-key")
