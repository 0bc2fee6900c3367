"""POST /v1/images/edits: forms with an image, with a mask or without, as OpenAI's clients send them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvar import Pipeline
from fastvar.serving.options import ServeOptions
from fastvar.serving.wire import uploads
from tests.serving.asking import EDITS, PROMPT, events, pixels, png

SMALL = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
PHOTO = Image.linear_gradient("L").resize((256, 256)).convert("RGB")
MASK = Image.new("L", (256, 256))
MASK.paste(255, (64, 64, 192, 192))


def sent(client: Any, files: Any, **fields: str) -> Any:
    return client.post(EDITS, files=files, data={"prompt": PROMPT, "seed": "7", **fields})


def part(name: str, image: Image.Image) -> tuple[str, tuple[str, bytes, str]]:
    return name, (f"{name}.png", png(image), "image/png")


def drawn(client: Any, files: Any, **fields: str) -> np.ndarray:
    answer = sent(client, files, **fields)
    assert answer.status_code == 200, answer.text
    return pixels(answer.json()["data"][0]["b64_json"])


def refused(client: Any, files: Any, **fields: str) -> dict[str, Any]:
    answer = sent(client, files, **fields)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_without_a_mask_the_image_is_enlarged(client, pipe: Pipeline):
    own = pixels(pipe.upscale(SMALL, PROMPT, seed=7).images[0])
    assert np.array_equal(drawn(client, [part("image", SMALL)]), own)
    assert np.array_equal(drawn(client, [part("image[]", SMALL)]), own), "as the SDK sends a list of one"
    own = pixels(pipe.upscale(SMALL, PROMPT, seed=7, keep_scales=1).images[0])
    assert np.array_equal(drawn(client, [part("image", SMALL)], keep_scales="1"), own)


def test_a_mask_is_redrawn_where_it_is_white_or_has_holes(client, pipe: Pipeline):
    own = pixels(pipe.inpaint(PHOTO, MASK, PROMPT, seed=7).images[0])
    assert np.array_equal(drawn(client, [part("image", PHOTO), part("mask", MASK)]), own)
    holes = PHOTO.copy()
    holes.putalpha(Image.eval(MASK, lambda level: 255 - level))
    assert np.array_equal(drawn(client, [part("image", PHOTO), part("mask", holes)]), own)


def test_fields_of_a_form_are_text(client, pipe: Pipeline):
    fields = {"n": "2", "guidance_scale": "2.5", "fit": "crop", "stream": "false", "tau": "", "output_format": "webp"}
    wide = PHOTO.resize((128, 64))
    answer = sent(client, [part("image", wide)], **fields).json()
    assert (len(answer["data"]), answer["output_format"]) == (2, "webp")
    own = pipe.upscale(wide, PROMPT, seed=7, num_images=2, guidance_scale=2.5, fit="crop")
    assert [image["settings"]["from"] for image in answer["data"]] == [own.settings["from"]] * 2


def test_an_edit_streams_under_its_own_name(client):
    *partial, done = events(sent(client, [part("image", SMALL)], stream="true", partial_images="2").text)
    assert {event["type"] for event in partial} == {"image_edit.partial_image"}
    assert done["type"] == "image_edit.completed"
    assert np.array_equal(pixels(done["b64_json"]), drawn(client, [part("image", SMALL)]))


def test_kept_tokens_count_as_input(client):
    usage = sent(client, [part("image", SMALL)]).json()["usage"]
    assert usage["input_tokens_details"]["image_tokens"] > 0


def test_classes_are_edited_too(make_client, var_editing_bundle: Path):
    made = make_client(ServeOptions(), {"classes": var_editing_bundle})
    with made as client, Pipeline.load(var_editing_bundle) as pipe:
        size = pipe.size[::-1]
        photo, mask = PHOTO.resize(size), MASK.resize(size)
        own = pixels(pipe.inpaint(photo, mask, class_labels=3, seed=7).images[0])
        files = [part("image", photo), part("mask", mask)]
        answer = client.post(EDITS, files=files, data={"class_label": "3", "seed": "7"})
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), own)


@pytest.mark.parametrize(
    ("files", "fields", "param", "told"),
    [
        ([part("picture", SMALL)], {}, "picture", "files as image, image[], mask"),
        ([part("image", SMALL), part("image", SMALL)], {}, "image", "2 files as image"),
        ([part("image", SMALL), part("image[]", SMALL)], {}, "image", "2 files as image"),
        ([part("mask", MASK)], {}, "image", "image is missing"),
        ([("image", ("a.png", b"no image", "image/png"))], {}, "image", "cannot be read: no kind of image file"),
        ([("image", ("a.gif", b"GIF89a" + bytes(30), "image/gif"))], {}, "image", "png, jpeg, webp"),
        ([("image", ("a.png", png(PHOTO)[:200], "image/png"))], {}, "image", "the image cannot be read"),
        ([part("image", PHOTO)], {}, "image", "fills all scales"),
        ([part("image", SMALL)], {"keep_scales": "99"}, "keep_scales", "from 1 to 64"),
        ([part("image", SMALL)], {"fit": "stretch"}, "fit", "'exact' or 'crop'"),
        ([part("image", SMALL.resize((64, 32)))], {}, "image", "fit: crop"),
        ([part("image", SMALL)], {"n": "two"}, "n", "from 1 to 10"),
        ([part("image", SMALL)], {"stream": "yes"}, "stream", "true or false"),
        ([part("image", SMALL)], {"guidance_scale": "nan"}, "guidance_scale", "from 0 to 100"),
        ([part("image", SMALL)], {"input_fidelity": "high"}, "input_fidelity", "is not known"),
        ([part("image", PHOTO), part("mask", Image.new("L", (256, 256)))], {}, "mask", "marks nothing"),
        ([part("image", PHOTO), part("mask", Image.new("L", (256, 256), 255))], {}, "mask", "leaves nothing"),
        ([part("image", PHOTO), part("mask", MASK)], {"keep_scales": "2"}, "keep_scales", "with a mask"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_words(client, files: Any, fields: dict[str, str], param: str, told: str):
    error = refused(client, files, **fields)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert told in error["message"]


def test_text_in_place_of_a_file(client):
    answer = client.post(EDITS, files=[part("image", SMALL)], data={"prompt": PROMPT, "mask": "text"})
    assert "mask is text" in answer.json()["error"]["message"]


def test_a_field_that_is_sent_twice(client):
    answer = client.post(EDITS, files=[part("image", SMALL)], data={"prompt": ["a", "b"]})
    assert "prompt is sent twice" in answer.json()["error"]["message"]


def test_json_is_no_form(client):
    answer = client.post(EDITS, json={"prompt": PROMPT})
    assert answer.status_code == 400
    assert "multipart/form-data" in answer.json()["error"]["message"]


def test_a_form_that_breaks_off(client):
    head = {"content-type": "multipart/form-data; boundary=x"}
    for body in (b"", b"--x\r\nContent-Dis", b"no boundary at all"):
        answer = client.post(EDITS, content=body, headers=head)
        assert answer.status_code == 400, answer.text
    answer = client.post(EDITS, content=b"", headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 400, answer.text


def test_too_many_parts(client):
    data = {f"field{number}": "x" for number in range(100)}
    answer = client.post(EDITS, files=[part("image", SMALL)], data=data)
    assert answer.status_code == 400, answer.text


def test_pixels_are_counted_before_they_are_decoded(client, monkeypatch: pytest.MonkeyPatch):
    files = [part("image", SMALL)]
    monkeypatch.setattr(uploads, "MOST_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    assert "64x64" in refused(client, files)["message"]


def test_a_bundle_without_an_encoder_says_so(make_client, tiny_bundle: Path):
    with make_client(ServeOptions(), {"plain": tiny_bundle}) as plain:
        assert "no image encoder" in refused(plain, [part("image", SMALL)])["message"]
        assert plain.get("/v1/models/plain").json()["edits"] is False
