"""Who may ask, how much may be sent, and what is written down of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastvar.errors import FastvarError, InputError, NumericsError
from fastvar.serving import guards
from fastvar.serving.options import ServeOptions, read_aliases, read_api_keys
from tests.serving.asking import EDITS, GENERATIONS, PROMPT, events


@pytest.fixture(scope="module")
def guarded(make_client):
    with make_client(ServeOptions(api_keys=("sesame", "second"), max_body="1KiB", log_prompts=True)) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def code(answer: Any) -> str:
    return str(answer.json()["error"]["code"])


def test_a_key_opens(guarded):
    for key in ("sesame", "second"):
        assert guarded.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize("headers", [{}, bearer("Sesame"), bearer(""), {"authorization": "Basic sesame"}])
def test_without_a_key_nothing_is_drawn(guarded, headers: dict[str, str]):
    for answer in (
        guarded.get("/v1/models", headers=headers),
        guarded.post(GENERATIONS, json={"prompt": PROMPT}, headers=headers),
        guarded.post(EDITS, headers=headers),
        guarded.get("/v1/nothing", headers=headers),
    ):
        assert (answer.status_code, code(answer)) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "sesame" not in answer.text.lower()


def test_what_machines_and_people_look_at_needs_no_key(guarded):
    for path in ("/", "/health", "/ready", "/metrics", "/openapi.json"):
        assert guarded.get(path).status_code == 200, path


def test_pages_of_other_sites_may_not_draw(client):
    answer = client.post(GENERATIONS, json={"prompt": PROMPT}, headers={"sec-fetch-site": "cross-site"})
    assert (answer.status_code, code(answer)) == (403, "cross_site")
    for own in ("same-origin", "none"):
        answer = client.post(GENERATIONS, json={"prompt": PROMPT}, headers={"sec-fetch-site": own})
        assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_a_body_that_is_too_large(guarded):
    answer = guarded.post(GENERATIONS, json={"prompt": "a" * 2000}, headers=bearer("sesame"))
    assert (answer.status_code, code(answer)) == (413, "body_too_large")
    assert "at most 1024" in answer.text

    def parts():
        for _ in range(3):
            yield b"x" * 600

    answer = guarded.post(GENERATIONS, content=parts(), headers=bearer("sesame") | {"content-type": "application/json"})
    assert (answer.status_code, code(answer)) == (413, "body_too_large"), "though its length was not announced"


def test_few_large_bodies_are_held_at_once(client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guards, "AT_ONCE", 0)
    guard = client.app.middleware_stack.app  # within Starlette's own
    monkeypatch.setattr(guard, "_reserved", 1)
    answer = client.post(EDITS, files={"image": ("a.png", b"x", "image/png")}, data={"prompt": PROMPT})
    assert (answer.status_code, code(answer)) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    assert guard._reserved == 1


def test_an_identity_is_kept_or_given(client):
    assert client.get("/health", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    given = [
        client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 200)
    ]
    assert len({*given}) == 3
    assert all(len(one) == 32 for one in given)


def test_what_is_logged(guarded, client):
    guarded.log.clear()
    client.log.clear()
    asked = {"prompt": PROMPT, "n": 2}
    guarded.post(GENERATIONS, json=asked, headers=bearer("sesame") | {"x-request-id": "one"})
    client.post(GENERATIONS, json=asked)
    client.post(GENERATIONS, json={"prompt": 3})
    client.get("/health")
    (entry,) = guarded.log
    assert (entry["request_id"], entry["status"], entry["n"], entry["prompt"]) == ("one", 200, 2, PROMPT)
    good, bad = client.log
    assert "prompt" not in good, "unless it is asked for"
    assert (good["model"], good["status"]) == ("texts", 200)
    assert (bad["status"], bad["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_in_the_log_and_not_in_the_answer(client, monkeypatch: pytest.MonkeyPatch, stream: bool):
    (model,) = client.app.state.fleet.models.values()
    monkeypatch.setattr(model.pipe, "draw", lambda *_: 1 / 0)
    client.log.clear()
    answer = client.post(GENERATIONS, json={"prompt": PROMPT, "stream": stream})
    error = events(answer.text)[-1]["error"] if stream else answer.json()["error"]
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert "ZeroDivisionError" not in answer.text
    assert "Traceback" not in answer.text
    assert any("ZeroDivisionError" in entry.get("traceback", "") for entry in client.log)
    monkeypatch.undo()
    assert client.post(GENERATIONS, json={"prompt": PROMPT}).status_code == 200, "the others go on"


def test_an_image_that_is_not_finite_says_so(client, monkeypatch: pytest.MonkeyPatch):
    (model,) = client.app.state.fleet.models.values()

    def draw(*_: Any) -> None:
        raise NumericsError("scale 3 holds NaN", fix="build in fp32")

    monkeypatch.setattr(model.pipe, "draw", draw)
    answer = client.post(GENERATIONS, json={"prompt": PROMPT})
    assert (answer.status_code, code(answer)) == (500, "numerics_error")
    assert "scale 3 holds NaN" in answer.text


def test_metrics_count(client):
    def value(series: str) -> float:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(series)]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    images, requests = (
        'fastvar_images_total{model="texts"}',
        'endpoint="/v1/images/generations",model="texts",status="200"',
    )
    before = value(images), value(f"fastvar_requests_total{{{requests}}}")
    client.post(GENERATIONS, json={"prompt": PROMPT, "n": 3})
    assert value(images) == before[0] + 3
    assert value(f"fastvar_requests_total{{{requests}}}") == before[1] + 1
    for name in ("queue_length", "running"):
        assert value(f'fastvar_{name}{{model="texts"}}') == 0
    assert value('fastvar_scale_seconds_count{model="texts",scale="0"}') > 0


def test_addresses_that_are_none(client):
    for method, path, status, told in (
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/images/generations/", 404, "not_found"),
        ("GET", GENERATIONS, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status, path
        assert code(answer) == told


def test_the_page_may_run_what_is_written_in_it_alone(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["content-type"].startswith("text/html")


# Options


def test_keys_of_a_file(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# who\n\n one \ntwo\n")
    assert read_api_keys(file) == ("one", "two")
    for text in ("", "# none\n", "a b\n", "Ж\n"):
        file.write_text(text)
        with pytest.raises(InputError, match="key"):
            read_api_keys(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_api_keys(tmp_path / "absent")


def test_aliases():
    assert read_aliases(["a=b", "c=b"]) == {"a": "b", "c": "b"}
    for wrong in (["a"], ["=b"], ["a="], ["a b=c"], ["a=b", "a=c"]):
        with pytest.raises(InputError, match="alias"):
            read_aliases(wrong)


def test_an_alias_of_nothing(make_client):
    for aliases in ({"other": "none"}, {"texts": "texts"}):
        with pytest.raises(InputError, match="alias"), make_client(ServeOptions(aliases=aliases)):
            pass


@pytest.mark.parametrize(
    "wrong", [{"queue": 0}, {"max_body": "0B"}, {"drain": -1}, {"batch_wait_ms": float("nan")}, {"drain": "long"}]
)
def test_options_out_of_range(wrong: dict[str, Any]):
    with pytest.raises(FastvarError):
        ServeOptions(**wrong)
