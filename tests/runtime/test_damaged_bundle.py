"""Damage that only the runtime can see: numbers that are not finite, and files that change after they were checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.engines.bundle.weight_file import WeightFile
from fastvar.errors import BundleError, NumericsError

PROMPT = "a red circle"
LAYER = "transformer.blocks.{}."


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def poison(bundle: Path, name: str, *, value: float = np.nan, row: int = 0) -> None:
    """Write a bad number into one tensor and sign the file anew, as a careless converter would."""
    path = bundle / "weights.safetensors"
    shape = WeightFile(path).shape(name)
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        start = json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(8 + length + start + 4 * row * int(np.prod(shape[1:])))
        file.write(np.float32(value).tobytes())
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["weights"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        (LAYER.format(0) + "ffn.fc2.weight", "scale 0 (1x1), layer 0:"),
        (LAYER.format(1) + "ffn.fc2.weight", "scale 0 (1x1), layer 1:"),
        (LAYER.format(0) + "sa.qkv.weight", "scale 0 (1x1), layer 0:"),
        (LAYER.format(1) + "sa.qkv.weight", "scale 0 (1x1), layer 1:"),
        (LAYER.format(1) + "ca.mat_kv.weight", "the condition of layer 1:"),
        ("transformer.head.weight", "scale 0 (1x1), the head:"),
        ("transformer.text_proj_for_ca.0.weight", "the condition:"),
        ("text_encoder.encoder.final_layer_norm.weight", "the text features:"),
    ],
)
def test_nan_is_named_by_scale_and_layer(bundle: Path, name: str, where: str):
    poison(bundle, name)
    pipe = Pipeline.load(bundle)
    with pytest.raises(NumericsError) as error:
        pipe(PROMPT)
    assert error.value.problem.startswith(where)
    assert "check the checkpoint" in error.value.fix


def test_infinity_counts_as_well(bundle: Path):
    poison(bundle, LAYER.format(1) + "ffn.fc2.bias", value=np.inf)
    with pytest.raises(NumericsError, match=r"^scale 0 \(1x1\), layer 1:"):
        Pipeline.load(bundle)(PROMPT, guidance_scale=1)


def test_nan_that_only_a_later_scale_meets(bundle: Path):
    """Row 6 of the level embedding enters with the tokens of scale 6, which the sampling head of scale 2 writes."""
    poison(bundle, "transformer.lvl_embed.weight", row=6)
    seen = []
    with pytest.raises(NumericsError, match=r"^scale 2 \(4x4\), the tokens of the next scale:"):
        Pipeline.load(bundle)(PROMPT, callback_on_scale_end=lambda event: seen.append(event.index))
    assert seen == [0, 2]


@pytest.mark.parametrize("layer", [0, 1])
def test_layer_of_a_later_scale(tiny_bundle: Path, layer: int):
    """An overflow on the way, with weights that are fine."""
    pipe = Pipeline.load(tiny_bundle)
    next(pipe.stream(PROMPT))
    workspace = pipe._session._workspaces[2, 1]
    step = workspace._steps[1]
    attn_mlp, launch = step.calls.layers[2 * layer + 1], step.launches[2 * layer + 1]

    def overflow() -> None:
        launch()
        workspace.read(attn_mlp, "x_out")[3] = np.inf

    step.launches[2 * layer + 1] = overflow
    with pytest.raises(NumericsError, match=rf"^scale 2 \(4x4\), layer {layer}:"):
        pipe(PROMPT)
    step.launches[2 * layer + 1] = launch
    assert len(list(pipe.stream(PROMPT))) == 3, "nothing of it is left behind"


def test_nan_in_the_decoder_is_no_image(bundle: Path):
    poison(bundle, "image_tokenizer.decoder.conv_out.conv.bias")
    with pytest.raises(NumericsError, match=r"^the image decoder:"):
        Pipeline.load(bundle)(PROMPT)


def test_pipeline_is_not_stuck_after_the_error(bundle: Path):
    poison(bundle, LAYER.format(0) + "ffn.fc2.weight")
    pipe = Pipeline.load(bundle)
    for _ in range(2):
        with pytest.raises(NumericsError, match="layer 0"):
            next(pipe.stream(PROMPT))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "pattern", ["engines/attn_mlp-*", "engines/decoder-*", "tokenizer.json", "weights.safetensors"]
)
def test_flipped_byte_is_found_when_loading(bundle: Path, pattern: str):
    path = next(bundle.glob(pattern))
    flip(path)
    with pytest.raises(BundleError, match="is damaged") as error:
        Pipeline.load(bundle)
    assert path.name in error.value.problem
    assert "rebuild" in error.value.fix


def test_byte_flipped_between_loading_and_use_changes_nothing(bundle: Path):
    """Engines are made when first needed, of the bytes that were checked; guidance 1 has engines of its own."""
    right = [event.preview().tobytes() for event in Pipeline.load(bundle).stream(PROMPT, seed=7, guidance_scale=1)]
    pipe = Pipeline.load(bundle)
    next(pipe.stream(PROMPT, seed=7, guidance_scale=3.0)).preview()
    flip(next(bundle.glob("engines/sampling_head-*-r1-*")))
    assert [event.preview().tobytes() for event in pipe.stream(PROMPT, seed=7, guidance_scale=1)] == right
    with pytest.raises(BundleError, match="is damaged"):
        Pipeline.load(bundle)
