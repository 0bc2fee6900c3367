"""POST /v1/images/generations: drawn as the pipeline draws, and told as OpenAI's clients read."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvar import Pipeline
from fastvar.serving.options import ServeOptions
from fastvar.serving.wire.reading import spread
from tests.serving.asking import GENERATIONS, PROMPT, comments, events, image_of, pixels


def drawn(client: Any, **asked: Any) -> dict[str, Any]:
    answer = client.post(GENERATIONS, json={"prompt": PROMPT, **asked})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: Any, status: int = 400, **asked: Any) -> dict[str, Any]:
    answer = client.post(GENERATIONS, json=asked)
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# Images


def test_the_image_is_the_pipelines(client, pipe: Pipeline):
    asked = {"seed": 7, "guidance_scale": 2.5, "tau": 0.8, "top_p": 0.9, "negative_prompt": "a blue square"}
    answer = drawn(client, **asked)
    assert np.array_equal(pixels(answer["data"][0]["b64_json"]), pixels(pipe(PROMPT, **asked).images[0]))
    assert answer["data"][0]["seed"] == 7
    assert answer["data"][0]["settings"]["guidance_scale"] == 2.5
    assert (answer["size"], answer["background"], answer["output_format"]) == ("256x256", "opaque", "png")
    assert answer["model"] == "texts"


def test_several_images_count_their_seeds_up(client, pipe: Pipeline):
    answer = drawn(client, n=3, seed=5)
    assert [image["seed"] for image in answer["data"]] == [5, 6, 7]
    alone = [pipe(PROMPT, seed=seed).images[0] for seed in (5, 6, 7)]
    assert all(np.array_equal(pixels(a["b64_json"]), pixels(b)) for a, b in zip(answer["data"], alone, strict=True))


def test_a_seed_that_nobody_chose_is_told_and_draws_the_image_again(client):
    first = drawn(client)["data"][0]
    assert first["seed"] < 2**53, "scripts in a page keep no more digits"
    assert drawn(client, seed=first["seed"])["data"][0]["b64_json"] == first["b64_json"]


def test_null_is_as_good_as_nothing(client):
    names = ("model", "n", "size", "output_format", "stream", "partial_images", "seed", "guidance_scale", "top_k")
    nothing = dict.fromkeys((*names, "negative_prompt", "class_label", "user", "quality", "background"))
    assert drawn(client, **nothing | {"seed": 3})["data"] == drawn(client, seed=3)["data"]


def test_what_has_no_effect_is_accepted(client):
    asked = {"quality": "high", "style": "vivid", "user": "u", "safety_identifier": "s", "moderation": "low"}
    assert drawn(client, seed=3, **asked)["data"] == drawn(client, seed=3)["data"]


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_every_format_says_what_it_was_made_from(client, tmp_path: Path, name: str):
    from fastvar.runtime.images.formats import read_metadata

    answer = drawn(client, seed=3, output_format=name)
    file = tmp_path / f"image.{name}"
    file.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    found = read_metadata(file)
    assert (found["prompt"], found["seed"]) == (PROMPT, "3")
    assert Image.open(file).format == name.upper()
    assert len(found["bundle"]) == 64


def test_compression_is_quality(client):
    sizes = [
        len(drawn(client, seed=3, output_format="jpeg", output_compression=quality)["data"][0]["b64_json"])
        for quality in (0, 50, 100)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_a_model_goes_by_its_name_by_an_alias_and_where_it_is_the_only_one_by_none(client):
    assert {drawn(client, model=name)["model"] for name in ("texts", "gpt-image-1", None)} == {"texts"}


def test_words_that_the_tokenizer_lacks_are_told(client):
    answer = drawn(client, prompt="a red circle Ж", seed=1)
    assert answer["warnings"] == ["the tokenizer does not know: Ж"]
    assert "warnings" not in drawn(client, seed=1)


def test_usage_counts_tokens(client, pipe: Pipeline):
    steps = pipe.manifest.plan.steps
    usage = drawn(client, n=2)["usage"]
    assert usage["output_tokens"] == 2 * sum(step.tokens for step in steps)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens"] == usage["input_tokens_details"]["text_tokens"] > 0


def test_times_are_told_in_a_header(client):
    answer = client.post(GENERATIONS, json={"prompt": PROMPT})
    parts = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert list(parts) == ["queue", "text", "scales", "decode"]
    assert float(parts["scales"]) > 0


# Streams


def streamed(client: Any, **asked: Any) -> str:
    answer = client.post(GENERATIONS, json={"prompt": PROMPT, "stream": True, **asked})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    assert "content-length" not in answer.headers
    return answer.text


def test_a_stream_ends_with_the_image(client):
    (done,) = events(streamed(client, seed=3))
    assert done["event"] == done["type"] == "image_generation.completed"
    assert done["b64_json"] == drawn(client, seed=3)["data"][0]["b64_json"]
    assert {"created_at", "size", "quality", "background", "output_format", "usage", "seed", "settings"} <= set(done)
    assert list(done["timings"]) == ["queue", "text", "scales", "decode"]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_as_many_previews_as_were_asked_for(client, count: int):
    found = events(streamed(client, partial_images=count))
    there = min(count, 2)  # the model has three scales, and the last is the image
    kinds = ["image_generation.partial_image"] * there + ["image_generation.completed"]
    assert [event["type"] for event in found] == kinds
    assert [event["partial_image_index"] for event in found[:-1]] == list(range(there))


def test_every_scale_is_shown_with_what_was_kept(client, pipe: Pipeline):
    *partial, done = events(streamed(client, previews="all", seed=3))
    steps = pipe.manifest.plan.steps
    assert [event["scale"] for event in partial] == [step.index for step in steps]
    assert [(event["tokens"], event["kept"]) for event in partial] == [(step.tokens, step.kept) for step in steps]
    assert {event["of"] for event in partial} == {len(pipe.manifest.plan.schedule)}
    own = [event.preview() for event in pipe.stream(PROMPT, seed=3)]
    for event, preview in zip(partial, own, strict=True):
        assert np.array_equal(pixels(event["b64_json"]), pixels(preview))
    assert image_of(done["b64_json"]).size == (256, 256)


def test_several_images_of_a_stream_are_told_apart(client):
    found = events(streamed(client, n=2, seed=3, partial_images=1))
    done = {event["image"]: event["b64_json"] for event in found if event["type"].endswith("completed")}
    assert [done[place] for place in (0, 1)] == [image["b64_json"] for image in drawn(client, n=2, seed=3)["data"]]


def test_a_client_that_leaves_when_all_is_drawn_is_counted(client):
    """It goes away after the last event has been made, while that is sent."""
    body = json.dumps({"prompt": PROMPT, "stream": True}).encode()
    is_sent = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await is_sent.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if b"completed" in message.get("body", b""):
            is_sent.set()
            await asyncio.Event().wait()  # nobody reads it

    headers = [(b"content-type", b"application/json"), (b"host", b"testserver")]
    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "query_string": b"", "headers": headers}
    client.portal.call(client.app, scope | {"http_version": "1.1", "scheme": "http"}, receive, send)
    assert 'fastvar_cancelled_total{model="texts",stage="sending"} 1.0' in client.get("/metrics").text
    assert (client.log[-1]["status"], client.log[-1]["cancelled"]) == (499, "sending")


def test_the_place_in_the_queue_is_a_comment(client):
    text = streamed(client)
    assert comments(text)[0] == "queue 0"
    assert "id:" not in text, "OpenAI's clients take a comment behind an id for an empty event"


def test_previews_are_spread_over_the_scales_and_leave_out_the_last():
    assert spread(list(range(13)), 3) == [3, 7, 11]
    assert spread(list(range(7)), 2) == [2, 5]
    assert spread(list(range(7)), 0) == spread([0], 3) == []
    assert spread([0, 3, 5], 2) == spread([0, 3, 5], 3) == [0, 3]


# Refused

UNKNOWN = "unknown_parameter"
INVALID = "invalid_value"


@pytest.mark.parametrize(
    ("asked", "code", "param", "told"),
    [
        ({"prompt": PROMPT, "steps": 4}, UNKNOWN, "steps", "parameter 'steps' is not known"),
        ({"prompt": PROMPT, "num_images": 2}, UNKNOWN, "num_images", "did you mean n?"),
        ({"prompt": PROMPT, "sed": 2}, UNKNOWN, "sed", "did you mean seed?"),
        ({}, "missing_required_parameter", "prompt", "prompt is missing"),
        ({"prompt": ""}, INVALID, "prompt", "the prompt is empty"),
        ({"prompt": 3}, INVALID, "prompt", "expected: text"),
        ({"prompt": "a " * 2000}, INVALID, "prompt", "tokens"),
        ({"prompt": PROMPT, "n": 11}, INVALID, "n", "a whole number from 1 to 10"),
        ({"prompt": PROMPT, "n": True}, INVALID, "n", "a whole number from 1 to 10"),
        ({"prompt": PROMPT, "n": "2"}, INVALID, "n", "a whole number from 1 to 10"),
        ({"prompt": PROMPT, "size": "1024x1024"}, INVALID, "size", "expected: auto or 256x256"),
        ({"prompt": PROMPT, "output_format": "gif"}, INVALID, "output_format", "'png' or 'jpeg' or 'webp'"),
        ({"prompt": PROMPT, "output_compression": 50}, INVALID, "output_compression", "leave output_compression away"),
        ({"prompt": PROMPT, "response_format": "url"}, INVALID, "response_format", "'b64_json'"),
        ({"prompt": PROMPT, "background": "transparent"}, INVALID, "background", "'auto' or 'opaque'"),
        ({"prompt": PROMPT, "stream": "yes"}, INVALID, "stream", "true or false"),
        ({"prompt": PROMPT, "partial_images": 2}, INVALID, "partial_images", "without stream"),
        ({"prompt": PROMPT, "stream": True, "partial_images": 4}, INVALID, "partial_images", "from 0 to 3"),
        ({"prompt": PROMPT, "seed": -1}, INVALID, "seed", "a whole number from 0"),
        ({"prompt": PROMPT, "seed": 2**63 - 1, "n": 2}, INVALID, "seed", "out of range"),
        ({"prompt": PROMPT, "guidance_scale": 101}, INVALID, "guidance_scale", "from 0 to 100"),
        ({"prompt": PROMPT, "tau": 5e-324}, INVALID, "tau", "from 0.0001 to 100"),
        ({"prompt": PROMPT, "top_p": 1.5}, INVALID, "top_p", "from 0 to 1"),
        ({"prompt": PROMPT, "top_k": 5}, INVALID, "top_k", "have no top_k"),
        ({"prompt": PROMPT, "class_label": 3}, INVALID, "class_label", "draws from texts"),
        ({"prompt": PROMPT, "guidance_scale": 1, "negative_prompt": "x"}, INVALID, "negative_prompt", "no effect"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(client, asked: dict[str, Any], code: str, param: str, told: str):
    error = refused(client, **asked)
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert told in error["message"]


def test_a_model_that_is_not_served(client):
    error = refused(client, 404, prompt=PROMPT, model="dall-e-3")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "expected: texts, gpt-image-1" in error["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "the body is no JSON"),
        (b"[1]", "the body is a JSON array"),
        (b'{"prompt": NaN}', "NaN is no JSON"),
        (b"\xff\xfe", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b'{"seed": ' + b"1" * 10_000 + b"}", "the body is no JSON"),
    ],
)
def test_a_body_that_is_no_object(client, body: bytes, told: str):
    answer = client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_text_that_no_encoding_can_carry(client):
    answer = client.post(GENERATIONS, content=b'{"prompt": "\\ud800"}', headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    answer = client.post(GENERATIONS, content=b'{"\\ud800": 1}', headers={"content-type": "application/json"})
    assert answer.json()["error"]["code"] == UNKNOWN


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_kind_of_body(client, kind: str):
    answer = client.post(GENERATIONS, content=json.dumps({"prompt": PROMPT}), headers={"content-type": kind})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


# Several models, and those that draw classes


@pytest.fixture(scope="module")
def both(make_client, batched_bundle: Path, var_editing_bundle: Path):
    bundles = {"texts": batched_bundle, "classes": var_editing_bundle}
    with make_client(ServeOptions(), bundles) as found:
        yield found


def test_of_several_models_one_is_named(both):
    error = refused(both, prompt=PROMPT)
    assert (error["code"], error["param"]) == ("missing_required_parameter", "model")
    assert "texts, classes" in error["message"]


def test_a_class_is_a_label_or_what_the_prompt_names(both, var_editing_bundle: Path):
    with Pipeline.load(var_editing_bundle) as pipe:
        own = pixels(pipe(class_labels=3, seed=5).images[0])
    for asked in ({"class_label": 3}, {"class_label": "3", "prompt": ""}, {"prompt": "3"}):
        answer = both.post(GENERATIONS, json={"model": "classes", "seed": 5, **asked}).json()
        assert np.array_equal(pixels(answer["data"][0]["b64_json"]), own)


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ({}, "missing_required_parameter", "class_label"),
        ({"class_label": 3, "prompt": "3"}, INVALID, "class_label"),
        ({"class_label": 10}, INVALID, "class_label"),
        ({"class_label": "zebra"}, INVALID, "class_label"),
        ({"class_label": 3, "negative_prompt": "x"}, INVALID, "negative_prompt"),
        ({"class_label": 3, "tau": 0.5}, INVALID, "tau"),
    ],
)
def test_classes_that_are_none(both, asked: dict[str, Any], code: str, param: str | None):
    error = refused(both, model="classes", **asked)
    assert (error["code"], error["param"]) == (code, param)


def test_models_are_listed(both, client):
    listed = {model["id"]: model for model in both.get("/v1/models").json()["data"]}
    assert (listed["texts"]["draws"], listed["classes"]["draws"]) == ("prompt", "class_label")
    assert listed["texts"]["batch"] == {"on": [1, 2, 4], "off": [1, 2, 4]}
    assert both.get("/v1/models/classes").json() == listed["classes"]
    assert client.get("/v1/models/gpt-image-1").json()["alias_of"] == "texts"
    assert both.get("/v1/models/none").status_code == 404


def test_a_preview_is_a_file_of_the_format_that_was_asked_for(client):
    first, *_ = events(streamed(client, partial_images=1, output_format="webp"))
    assert Image.open(io.BytesIO(base64.b64decode(first["b64_json"]))).format == "WEBP"
    assert first["output_format"] == "webp"
