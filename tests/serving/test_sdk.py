"""OpenAI's own clients, Python and JavaScript, against a real server."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving.asking import PROMPT, pixels, png
from tests.serving.processes import Served, serving

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("sdk.mjs")
SMALL = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
PHOTO = SMALL.resize((256, 256))
MASK = Image.new("L", (256, 256))
MASK.paste(255, (64, 64, 192, 192))


@pytest.fixture(scope="module")
def server(batched_bundle: Path) -> Iterator[Served]:
    with serving(f"texts={batched_bundle}", "--alias", "gpt-image-1=texts", "--queue", "2", "--batch", "1") as served:
        yield served


@pytest.fixture(params=[False, True], ids=["default", "strict"])
def sdk(server: Served, request: pytest.FixtureRequest) -> openai.OpenAI:
    return client(server, _strict_response_validation=request.param)


def client(served: Served, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", **{"max_retries": 0, **more})


def file(image: Image.Image, name: str = "image.png") -> io.BytesIO:
    found = io.BytesIO(png(image))
    found.name = name
    return found


def data(response: Any, place: int = 0) -> str:
    return str(response.data[place].b64_json)


def test_models(sdk: openai.OpenAI):
    assert [model.id for model in sdk.models.list()] == ["texts", "gpt-image-1"]
    assert sdk.models.retrieve("gpt-image-1").model_extra["alias_of"] == "texts"


def test_generate(sdk: openai.OpenAI):
    found = sdk.images.generate(
        prompt=PROMPT, model="gpt-image-1", n=2, size="256x256", quality="low", user="u", extra_body={"seed": 7}
    )
    assert found._request_id
    assert [image.model_extra["seed"] for image in found.data] == [7, 8]
    assert pixels(data(found)).shape == (256, 256, 3)
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    again = sdk.images.generate(prompt=PROMPT, extra_body={"seed": 8})
    assert data(again) == data(found, 1)


def test_stream(sdk: openai.OpenAI):
    *partial, done = list(sdk.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7}))
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert partial[0].model_extra["of"] == 7
    assert done.type == "image_generation.completed"
    assert done.b64_json == data(sdk.images.generate(prompt=PROMPT, extra_body={"seed": 7}))


def test_edit(sdk: openai.OpenAI):
    larger = sdk.images.edit(image=file(SMALL), prompt=PROMPT, extra_body={"seed": 7})
    listed = sdk.images.edit(image=[file(SMALL)], prompt=PROMPT, extra_body={"seed": 7})
    assert data(larger) == data(listed)
    holes = PHOTO.copy()
    holes.putalpha(Image.eval(MASK, lambda level: 255 - level))
    both = [
        sdk.images.edit(image=file(PHOTO), mask=file(mask, "mask.png"), prompt=PROMPT, n=1, extra_body={"seed": 7})
        for mask in (MASK, holes)
    ]
    assert data(both[0]) == data(both[1])
    assert np.array_equal(pixels(data(both[0]))[:32, :32], np.asarray(PHOTO)[:32, :32])


def test_a_streamed_edit(sdk: openai.OpenAI):
    *partial, done = list(sdk.images.edit(image=file(SMALL), prompt=PROMPT, stream=True, partial_images=1))
    assert [event.type for event in partial] == ["image_edit.partial_image"]
    assert done.type == "image_edit.completed"


@pytest.mark.parametrize(
    ("asked", "error", "code", "param"),
    [
        ({"size": "1024x1024"}, openai.BadRequestError, "invalid_value", "size"),
        ({"extra_body": {"steps": 3}}, openai.BadRequestError, "unknown_parameter", "steps"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model_not_found", "model"),
    ],
)
def test_errors(sdk: openai.OpenAI, asked: dict[str, Any], error: type[openai.APIStatusError], code: str, param: str):
    with pytest.raises(error) as caught:
        sdk.images.generate(prompt=PROMPT, **asked)
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert "expected: " in caught.value.message
    assert caught.value.request_id


def test_a_key_that_is_missing(batched_bundle: Path, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("sesame\n")
    with serving(batched_bundle, "--api-key-file", str(keys)) as served:
        with pytest.raises(openai.AuthenticationError) as caught:
            client(served).models.list()
        assert caught.value.code == "invalid_api_key"
        assert openai.OpenAI(base_url=f"{served.url}/v1", api_key="sesame").models.list().data


def test_who_is_refused_comes_again_by_itself(server: Served):
    """Far more than the queue holds; the client obeys retry-after."""
    patient = client(server, max_retries=30)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: patient.images.generate(prompt=PROMPT, extra_body={"seed": seed}), range(8)))
    assert [image.data[0].model_extra["seed"] for image in found] == list(range(8))
    impatient = client(server)
    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(lambda _: outcome(impatient), range(12)))
    assert "queue_full" in outcomes
    assert set(outcomes) <= {"drawn", "queue_full"}


def outcome(impatient: openai.OpenAI) -> str | None:
    try:
        impatient.images.generate(prompt=PROMPT, n=4)
    except openai.RateLimitError as error:
        return error.code
    return "drawn"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with OpenAI's package for JavaScript."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("there is no node")
    folder = tmp_path_factory.mktemp("packages")
    shutil.copy(SCRIPT, folder)
    made = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "openai@7"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    if made.returncode:
        pytest.skip(f"npm cannot install openai: {made.stderr[-300:]}")
    return folder


def test_javascript(server: Served, packages: Path):
    (packages / "image.png").write_bytes(png(SMALL))
    node = subprocess.run(
        ["node", SCRIPT.name, f"{server.url}/v1"], cwd=packages, capture_output=True, text=True, timeout=120
    )
    assert node.returncode == 0, node.stderr
    found = json.loads(node.stdout)
    assert found["models"] == ["texts", "gpt-image-1"]
    assert found["seeds"] == [7, 8]
    assert found["types"] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert found["completed_equals_generated"] is True
    assert found["edited_bytes"] > 1000
    assert found["error"] == {"status": 400, "code": "invalid_value", "param": "size", "has_id": True}
