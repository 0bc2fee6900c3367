"""`fastvar.ray_serve` on a cluster of this machine: the answers of `fastvar serve`, whatever dies."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.errors import InputError
from tests.ray import paced
from tests.serving.asking import EDITS, GENERATIONS, PROMPT, events, pixels

pytest.importorskip("ray", reason="ray is not installed; `make test-ray` installs it")
pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Answer:
    """What came back, and when its parts did, in seconds since the request."""

    status: int
    headers: dict[str, str]
    body: bytes
    came: list[float]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found


@dataclass
class Client:
    """Asks the cluster's proxy."""

    port: int

    def ask(self, path: str, fields: dict[str, Any] | None = None, **headers: str) -> Answer:
        connection, begun = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120), time.monotonic()
        body = None if fields is None else json.dumps(fields)
        connection.request(
            "GET" if body is None else "POST", path, body, {"content-type": "application/json", **headers}
        )
        answer = connection.getresponse()
        parts, came = [], []
        while part := answer.read1():
            parts.append(part)
            came.append(time.monotonic() - begun)
        connection.close()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, b"".join(parts), came)

    def draw(self, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        return self.ask(GENERATIONS, {"prompt": PROMPT, "model": "tiny", **fields}, **(headers or {}))

    def leave(self, **fields: Any) -> None:
        """Ask, and hang up at the first byte of the answer."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            body = json.dumps({"prompt": PROMPT, "model": "tiny", **fields}).encode()
            head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
            if fields.get("stream"):
                connection.recv(1)
            else:
                wait_for(lambda: scales() > 0)


# Of replicas: one may be killed between two images, so several die, until one did while it drew.
FEWEST_KILLS, MOST_KILLS = 2, 8


def scales() -> int:
    return paced.scales().stat().st_size if paced.scales().exists() else 0


def wait_for(found: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def pace() -> Iterator[Any]:
    """Sets the seconds of a scale."""
    paced.scales().unlink(missing_ok=True)
    yield lambda seconds: paced.pace().write_text(str(seconds))
    paced.pace().unlink(missing_ok=True)


@pytest.fixture(scope="module")
def client(cluster) -> Iterator[Client]:
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield Client(port)
    serve.shutdown()


def deployed(arguments: dict[str, Any]) -> None:
    from ray import serve

    from fastvar.ray_serve import app

    serve.run(app(arguments), name="fastvar", route_prefix="/")


@dataclass(frozen=True)
class Replica:
    """A process of Ray that draws."""

    actor: str
    pid: int


def replicas() -> list[Replica]:
    """Those that are there."""
    from ray._private.state import actors  # the public list asks a dashboard, which is not here

    alive = [(name, actor) for name, actor in actors().items() if actor["State"] == "ALIVE"]
    return [Replica(name, actor["Pid"]) for name, actor in alive if "fastvar#Replica" in (actor["Name"] or "")]


@pytest.fixture(scope="module")
def two(client: Client, batched_bundle: Path, var_editing_bundle: Path) -> Client:
    """Two bundles behind one ingress; three requests of each may wait."""
    bundles = f"tiny={batched_bundle},labels={var_editing_bundle}"
    deployed({"bundles": bundles, "aliases": "gpt-image-1=tiny", "queue": "3", "cpus": "0.5"})
    return client


@pytest.fixture(scope="module")
def own(batched_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(batched_bundle) as pipe:
        yield pipe


def test_an_image_is_the_pipelines(two: Client, own: Pipeline):
    answer = two.draw({"x-request-id": "abc"}, seed=7)
    assert answer.status == 200, answer.body[:500]
    assert np.array_equal(pixels(answer.json["data"][0]["b64_json"]), pixels(own(PROMPT, seed=7).images[0]))
    several = two.draw(seed=7, n=3).json
    assert [image["seed"] for image in several["data"]] == [7, 8, 9]
    assert answer.headers["x-request-id"] == "abc"


def test_openais_client_is_answered(two: Client, own: Pipeline):
    openai = pytest.importorskip("openai")
    asked = openai.OpenAI(base_url=f"http://127.0.0.1:{two.port}/v1", api_key="none")
    drawn = asked.images.generate(prompt=PROMPT, model="gpt-image-1", extra_body={"seed": 3})
    assert np.array_equal(pixels(drawn.data[0].b64_json), pixels(own(PROMPT, seed=3).images[0]))
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        asked.images.generate(prompt=PROMPT, model="other")


def test_two_bundles_take_turns(two: Client, own: Pipeline, var_editing_bundle: Path):
    with Pipeline.load(var_editing_bundle) as pipe:
        labels = {seed: pixels(pipe(class_labels=3, seed=seed).images[0]) for seed in range(4)}
    for seed in range(4):
        words = two.draw(seed=seed)
        label = two.ask(GENERATIONS, {"class_label": 3, "model": "labels", "seed": seed})
        assert (words.status, label.status) == (200, 200), (words.body[:300], label.body[:300])
        assert np.array_equal(pixels(words.json["data"][0]["b64_json"]), pixels(own(PROMPT, seed=seed).images[0]))
        assert np.array_equal(pixels(label.json["data"][0]["b64_json"]), labels[seed])
    assert {model["id"] for model in two.ask("/v1/models").json["data"]} == {"tiny", "labels", "gpt-image-1"}
    assert two.ask("/v1/models/labels").json["draws"] == "class_label"
    assert two.ask("/v1/models/gpt-image-1").json["alias_of"] == "tiny"


def test_a_form_with_an_image_finds_its_bundle(two: Client, own: Pipeline):
    from PIL import Image

    from tests.serving.asking import png

    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    parts = {"model": b"tiny", "prompt": PROMPT.encode(), "seed": b"5"}
    lines = [
        b'--x\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (k.encode(), v) for k, v in parts.items()
    ]
    lines.append(
        b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + png(image) + b"\r\n"
    )
    request = urllib.request.Request(f"http://127.0.0.1:{two.port}{EDITS}", b"".join(lines) + b"--x--\r\n")
    request.add_header("content-type", "multipart/form-data; boundary=x")
    with urllib.request.urlopen(request) as answer:
        drawn = json.load(answer)["data"][0]["b64_json"]
    assert np.array_equal(pixels(drawn), pixels(own.upscale(image, PROMPT, seed=5).images[0]))


def test_a_stream_arrives_event_by_event(two: Client, own: Pipeline, pace: Any):
    pace(0.2)
    answer = two.draw(seed=7, stream=True, previews="all")
    found = events(answer.body.decode())
    assert [one["type"].rpartition(".")[2] for one in found][-1] == "completed"
    assert len(found) >= 3
    assert answer.came[-1] - answer.came[0] > 0.4, "not all at once"
    assert len(answer.came) >= len(found) - 1
    assert np.array_equal(pixels(found[-1]["b64_json"]), pixels(own(PROMPT, seed=7).images[0]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_drawn_for_no_further(two: Client, own: Pipeline, pace: Any, stream: bool):
    drawn = len(own.manifest.plan.steps)
    pace(0.4)
    two.leave(seed=1, stream=stream, n=8)
    time.sleep(0.4 * drawn + 1)
    assert 1 <= scales() < 2 * drawn, "of two passes, which may be drawn side by side"
    pace(0)
    answer = two.draw(seed=7)
    assert np.array_equal(pixels(answer.json["data"][0]["b64_json"]), pixels(own(PROMPT, seed=7).images[0]))


def test_a_full_queue_is_told_as_clients_read_it(two: Client, pace: Any):
    pace(0.2)
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda seed: two.draw(seed=seed, n=2), range(24)))
    seen = Counter(answer.status for answer in answers)
    assert set(seen) == {200, 429}
    for answer in answers:
        if answer.status == 429:
            assert (answer.error["code"], answer.error["type"]) == ("queue_full", "rate_limit_error")
            assert int(answer.headers["retry-after"]) >= 1


def test_what_cannot_be_drawn_is_told_in_openais_form(two: Client):
    unknown = two.draw(model="other")
    assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")
    unnamed = two.ask(GENERATIONS, {"prompt": PROMPT})
    assert (unnamed.status, unnamed.error["code"]) == (400, "missing_required_parameter")
    wrong = two.draw(sed=1)
    assert (wrong.status, wrong.error["code"]) == (400, "unknown_parameter")
    assert two.ask("/other").error["code"] == "not_found"
    assert two.ask(GENERATIONS).error["code"] == "method_not_allowed"
    assert two.draw(prompt="a" * (2 << 20)).status == 413
    assert two.draw({"sec-fetch-site": "cross-site"}).error["code"] == "cross_site"


def test_addresses_beside_those_that_draw(two: Client):
    assert two.ask("/health").json == {"status": "ok"}
    assert two.ask("/ready").json == {"status": "ready"}
    page = two.ask("/")
    assert page.body.startswith(b"<!doctype html>") or page.body.startswith(b"<!DOCTYPE html>")
    assert "content-security-policy" in page.headers
    description = two.ask("/openapi.json").json
    fields = description["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    names = json.dumps(fields)
    assert all(name in names for name in ("tiny", "labels", "gpt-image-1", "tau"))
    numbers = two.ask("/metrics")
    assert (numbers.status, "ray_fastvar_" in numbers.error["message"]) == (404, True)


def test_numbers_of_a_replica_are_rays(two: Client):
    import ray

    assert two.draw(seed=1).status == 200
    port = ray.nodes()[0]["MetricsExportPort"]

    def counted() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        return any(
            line.startswith("ray_fastvar_images_total{") and 'model="tiny"' in line for line in text.splitlines()
        )

    wait_for(counted, 40)


def test_keys_are_asked_for(client: Client, two: Client, batched_bundle: Path, tmp_path: Path):
    (tmp_path / "keys").write_text("secret\n")
    deployed({"bundles": f"tiny={batched_bundle}", "api_key_file": str(tmp_path / "keys"), "cpus": "0.5"})
    assert client.ask("/v1/models").error["code"] == "invalid_api_key"
    assert client.draw(seed=1).error["code"] == "invalid_api_key"
    assert client.draw({"authorization": "Bearer other"}, seed=1).status == 401
    assert client.ask("/").status == client.ask("/health").status == 200
    drawn = client.ask(GENERATIONS, {"prompt": PROMPT, "seed": 1}, authorization="Bearer secret")
    assert drawn.status == 200
    assert client.ask("/v1/models", authorization="Bearer secret").status == 200


def test_replicas_come_with_the_load_and_may_be_killed_under_it(
    client: Client, batched_bundle: Path, own: Pipeline, pace: Any
):
    """Whoever dies, an answer is the right image, a 429, or an error that clients try again; a second replica comes."""
    scaling = {"replicas": "2", "ongoing": "1", "upscale_delay_s": "1", "cpus": "0.5"}
    deployed({"bundles": f"tiny={batched_bundle}", "queue": "4", **scaling})
    pace(0.05)
    right = {seed: pixels(own(PROMPT, seed=seed).images[0]) for seed in range(8)}
    over, answers, broken = threading.Event(), list[Answer](), list[str]()

    def load(first: int) -> None:
        seed = first
        while not over.is_set():
            try:
                answer = client.draw(seed=seed % 8)
            except (http.client.HTTPException, OSError) as error:
                broken.append(repr(error))
                continue
            answers.append(answer)
            if answer.status == 200:
                assert np.array_equal(pixels(answer.json["data"][0]["b64_json"]), right[seed % 8])
            else:
                assert answer.error["code"]
                time.sleep(0.2)
            seed += 1

    with ThreadPoolExecutor(6) as pool:
        loads = [pool.submit(load, first) for first in range(6)]
        try:
            wait_for(lambda: len(replicas()) == 2)
            for kills in range(MOST_KILLS):
                if kills >= FEWEST_KILLS and any(answer.status == 503 for answer in answers):
                    break
                before = len(answers)
                victim = random.Random(before).choice(replicas())
                os.kill(victim.pid, signal.SIGKILL)
                wait_for(lambda gone=victim: gone not in replicas())
                wait_for(lambda: len(replicas()) == 2)
                wait_for(lambda seen=before: len(answers) > seen + 12)
        finally:
            over.set()
        for one in loads:
            one.result()
    seen = Counter(answer.status for answer in answers)
    assert seen[200] > 24
    assert seen[503] > 0, "it was killed while it drew"
    assert set(seen) <= {200, 429, 503}, seen
    for answer in answers:
        if answer.status == 503:
            assert answer.error["code"] == "replica_lost"
            assert int(answer.headers["retry-after"]) >= 1
    assert broken == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "no bundles"),
        ({"bundles": "a=x", "sized": "1"}, "'sized' is not known"),
        ({"bundles": "a=x", "queue": "many"}, "queue='many'"),
        ({"bundles": "a=x", "queue": "0"}, "queue"),
        ({"bundles": "a=x", "aliases": "b=c"}, "alias b"),
    ],
)
def test_arguments_that_are_not_understood(given: dict[str, str], told: str):
    from fastvar.ray_serve import app

    with pytest.raises(InputError, match=told):
        app(given)
