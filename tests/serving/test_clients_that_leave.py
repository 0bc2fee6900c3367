"""Clients that leave, dawdle, or send what harms; and a server that is told to end: each against a real process."""

from __future__ import annotations

import http.client
import io
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.serving.asking import EDITS, GENERATIONS, PROMPT, events, png
from tests.serving.processes import Served, paced, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(batched_bundle: Path) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATIENCE", "3")
        with paced(batched_bundle, "--queue", "4") as served:
            yield served


def connection(served: Served) -> http.client.HTTPConnection:
    parts = urlsplit(served.url)
    assert parts.hostname
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)


def begun(served: Served, **asked: Any) -> http.client.HTTPConnection:
    """A request that has been sent."""
    found = connection(served)
    body = json.dumps({"prompt": PROMPT, **asked})
    found.request("POST", GENERATIONS, body, {"content-type": "application/json"})
    return found


def answered(served: Served, **asked: Any) -> tuple[int, dict[str, Any]]:
    answer = begun(served, **asked).getresponse()
    return answer.status, json.loads(answer.read())


def metric(served: Served, series: str) -> float:
    found = connection(served)
    found.request("GET", "/metrics")
    lines = [line for line in found.getresponse().read().decode().splitlines() if line.startswith(series + " ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def name(served: Served) -> str:
    found = connection(served)
    found.request("GET", "/v1/models")
    return str(json.loads(found.getresponse().read())["data"][0]["id"])


def cancelled(served: Served, stage: str) -> float:
    return metric(served, f'fastvar_cancelled_total{{model="{name(served)}",stage="{stage}"}}')


def running(served: Served) -> float:
    return metric(served, f'fastvar_running{{model="{name(served)}"}}')


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_in_the_middle_is_drawn_no_further(server: Served, stream: bool):
    before, images = cancelled(server, "drawing"), metric(server, f'fastvar_images_total{{model="{name(server)}"}}')
    asked = begun(server, n=10, **({"stream": True, "previews": "all"} if stream else {}))
    if stream:
        assert b"queue" in asked.getresponse().readline()
    until(lambda: running(server) == 1)
    assert asked.sock is not None or stream
    left = time.monotonic()
    asked.close()
    until(lambda: cancelled(server, "drawing") == before + 1)
    until(lambda: running(server) == 0)
    assert time.monotonic() - left < 3, "ten images take nine"
    assert metric(server, f'fastvar_images_total{{model="{name(server)}"}}') - images < 5
    assert answered(server)[0] == 200


def test_who_leaves_the_queue_is_not_drawn(server: Served):
    before = cancelled(server, "queued")
    first = begun(server)
    until(lambda: running(server) == 1)
    images = metric(server, f'fastvar_images_total{{model="{name(server)}"}}')
    waiting = begun(server, n=10)
    until(lambda: metric(server, f'fastvar_queue_length{{model="{name(server)}"}}') == 1)
    waiting.close()
    until(lambda: cancelled(server, "queued") == before + 1)
    assert first.getresponse().status == 200
    assert metric(server, f'fastvar_images_total{{model="{name(server)}"}}') == images + 1


def test_everything_else_answers_while_images_are_drawn(server: Served):
    asked = begun(server, n=3)
    until(lambda: running(server) == 1)
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/"):
        begin, found = time.monotonic(), connection(server)
        found.request("GET", path)
        assert found.getresponse().status == 200
        assert time.monotonic() - begin < 1, path
    assert asked.getresponse().status == 200


def test_more_than_may_wait_are_told_to_come_again(server: Served):
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: answered(server), range(12)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 429}
    assert 1 + 4 <= statuses.count(200) <= 8
    assert {body["error"]["code"] for status, body in answers if status == 429} == {"queue_full"}


@pytest.mark.parametrize("where", ["in the head", "in a second head", "in the body"])
def test_a_client_that_sends_a_byte_a_second(server: Served, where: str):
    parts = urlsplit(server.url)
    before = {
        "in the head": "",
        "in a second head": "GET /health HTTP/1.1\r\nhost: x\r\n\r\n",
        "in the body": f"POST {GENERATIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        "content-length: 100\r\n\r\n",
    }[where]
    begin = time.monotonic()
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as slow:
        slow.sendall(before.encode())
        told = trickled(slow, b"POST / HTTP/1.1 and so on")
    assert time.monotonic() - begin < 10
    if where == "in the body":
        assert b"HTTP/1.1 408" in told
        assert b"request_timeout" in told


def trickled(slow: socket.socket, data: bytes) -> bytes:
    """Send a byte a second until the connection is closed; what was received."""
    slow.settimeout(1)
    told = b""
    for byte in data:
        try:
            slow.sendall(bytes([byte]))
            received = slow.recv(4096)
        except TimeoutError:
            continue
        except ConnectionError:
            return told
        if not received:
            return told
        told += received
    raise AssertionError("it was never closed")


def test_a_client_that_does_not_read_its_answer(server: Served):
    """Its buffers are full of previews; the images are drawn, and the connection ends."""
    parts = urlsplit(server.url)
    body = json.dumps({"prompt": PROMPT, "n": 10, "stream": True, "previews": "all"})
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((parts.hostname, parts.port))
        head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        deaf.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: running(server) == 1)
        until(lambda: running(server) == 0, 60)
    assert answered(server)[0] == 200


def test_an_image_of_ten_thousand_pixels_a_side_is_not_decoded(server: Served):
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    before = resident(server)
    boundary, data = "x", bomb.getvalue()
    for field, other in (("image", None), ("mask", Image.new("RGB", (64, 64)))):
        parts = [(field, data)] + ([("image", png(other))] if other else [])
        body = b"".join(
            f'--{boundary}\r\ncontent-disposition: form-data; name="{part}"; filename="a.png"\r\n\r\n'.encode()
            + content
            + b"\r\n"
            for part, content in parts
        )
        body += f'--{boundary}\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n{PROMPT}\r\n'.encode()
        body += f"--{boundary}--\r\n".encode()
        asked = connection(server)
        asked.request("POST", EDITS, body, {"content-type": f"multipart/form-data; boundary={boundary}"})
        answer = asked.getresponse()
        error = json.loads(answer.read())["error"]
        assert (answer.status, error["param"]) == (400, field)
        assert "10000x10000" in error["message"]
    assert resident(server) - before < 50 << 20


def resident(served: Served) -> int:
    text = Path(f"/proc/{served.process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))


# The end


def ended(served: Served, seconds: float = 30) -> int:
    return served.process.wait(seconds)


def test_sigterm_finishes_what_has_begun_and_refuses_what_waits(batched_bundle: Path):
    with paced(batched_bundle) as served:
        stream = begun(served, stream=True, previews="all").getresponse()
        stream.readline()
        until(lambda: running(served) == 1)
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(answered, served), pool.submit(begun(served, stream=True).getresponse)]
            until(lambda: metric(served, f'fastvar_queue_length{{model="{name(served)}"}}') == 2)
            served.process.send_signal(signal.SIGTERM)
            status, body = waiting[0].result()
            assert (status, body["error"]["code"]) == (503, "shutting_down")  # type: ignore[index]  # of the first
            queued = events(waiting[1].result().read().decode())  # type: ignore[union-attr]  # of the second
            assert queued[-1]["error"]["code"] == "shutting_down"
        probe = connection(served)
        probe.request("GET", "/ready")
        assert probe.getresponse().status == 503
        assert answered(served)[0] == 503
        found = events(stream.read().decode())
        assert found[-1]["type"] == "image_generation.completed", "what had begun is finished"
        assert ended(served) == 0


def test_sigterm_ends_what_takes_longer_than_the_drain(batched_bundle: Path):
    with paced(batched_bundle, "--drain", "0.5") as served:
        stream = begun(served, stream=True, previews="all", n=10).getresponse()
        stream.readline()
        until(lambda: running(served) == 1)
        begin = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        found = events(stream.read().decode())
        assert found[-1]["error"]["code"] == "shutting_down", "before the connection goes"
        assert ended(served) == 0
        assert time.monotonic() - begin < 10


def test_a_second_signal_ends_at_once(batched_bundle: Path):
    with paced(batched_bundle, "--drain", "600") as served:
        asked = begun(served, n=10)  # let go of, its connection would close
        until(lambda: running(served) == 1)
        begin = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        served.process.send_signal(signal.SIGTERM)
        ended(served, 20)
        asked.close()
        assert time.monotonic() - begin < 15


def test_killed_and_started_again_it_draws_on(batched_bundle: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with paced(batched_bundle, "--port", port) as served:
        asked = begun(served, n=10)
        until(lambda: running(served) == 1)
        served.process.kill()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            asked.getresponse()
    with paced(batched_bundle, "--port", port) as served:
        assert answered(served)[0] == 200


def test_a_port_that_is_taken_and_a_bundle_that_is_none(batched_bundle: Path, tmp_path: Path, server: Served):
    port = str(urlsplit(server.url).port)
    for arguments, told in (
        ([batched_bundle, "--port", port], f"cannot listen on 127.0.0.1:{port}"),
        ([tmp_path / "nothing"], "nothing"),
        ([batched_bundle, batched_bundle], "two bundles are named"),
        ([batched_bundle, "--alias", "a=b"], "no model b"),
    ):
        bundles = [argument for argument in arguments if isinstance(argument, Path)]
        options = [str(argument) for argument in arguments if not isinstance(argument, Path)]
        with pytest.raises(AssertionError, match="ended with 2") as caught, serving(bundles, *options):
            pass
        assert told in str(caught.value)
        assert "Traceback" not in str(caught.value)
