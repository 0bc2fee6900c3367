"""The workspace below the pipeline: what the text looks like in memory, and images forced bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.errors import InternalError
from fastvar.runtime.requests.inputs import TextInput
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.workspace import Workspace

GUIDED = SamplingSettings(3.0, 1.0, 0.97)
LONG = "a large striped red circle above a small blue square on white"


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle)


@pytest.fixture(scope="module")
def workspace(pipe: Pipeline) -> Workspace:
    return pipe._session.workspace(2)


def text(pipe: Pipeline, prompt: str, negative: str | None = None) -> TextInput:
    encode = pipe._reader.subjects.tokenizer.encode
    return TextInput(encode(prompt), None if negative is None else encode(negative))


def half(_scale: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, 0.5, np.float32)


def test_each_row_masks_its_own_padding(pipe: Pipeline, workspace: Workspace):
    workspace.give(text(pipe, LONG, LONG))
    workspace.give(text(pipe, "a red circle", "white"))  # behind both, memory holds the longer texts
    conditioning = workspace.layout.conditioning
    counts = np.arange(16) < np.array([[4], [2]])
    np.testing.assert_array_equal(workspace.read(conditioning, "mask"), counts)
    heads = pipe.manifest.transformer.heads
    bias = workspace.read(conditioning, "text_bias").reshape(2, heads, 16)
    for head in range(heads):
        np.testing.assert_array_equal(bias[:, head] == 0, counts)
        assert (bias[:, head][~counts] < -1e29).all()
    for row, (name, length) in enumerate((("cond", 4), ("uncond", 2))):
        features = workspace.read(conditioning, name)
        assert features[:length].any(axis=1).all(), row
        assert not features[length:].any(), row


def test_learned_text_stands_in_for_a_negative_prompt(pipe: Pipeline, workspace: Workspace):
    """Cut to the prompt's length, as upstream does."""
    workspace.give(text(pipe, "a red circle", LONG))
    workspace.give(text(pipe, "a red circle"))
    found = workspace.read(workspace.layout.conditioning, "uncond")
    np.testing.assert_array_equal(found[:4], pipe._session.weights["transformer.cfg_uncond"][:4])
    assert not found[4:].any()
    assert workspace.read(workspace.layout.conditioning, "mask").sum(axis=1).tolist() == [4, 4]


def test_what_lies_in_the_padding_has_no_effect(workspace: Workspace):
    """The text encoder leaves padding rows undefined, so they may even be NaN."""
    features = np.random.default_rng(0).standard_normal((2, 16, 128)).astype(np.float32)
    drawn = []
    for padding in (0.0, 7.0, np.nan):
        features[:, 5:] = padding
        workspace.set_features(features[0], features[1], (5, 5))
        drawn.append([workspace.summed_codes(calls).copy() for calls, _ in workspace.run_scales(half, GUIDED)])
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


@pytest.mark.parametrize(("noise", "sign"), [(-1.0, 1), (2.0, -1)])
def test_noise_outside_its_range_forces_bits(workspace: Workspace, pipe: Pipeline, noise: float, sign: int):
    """All bits equal: every scale adds +-1 / sqrt(bits) everywhere, also enlarged."""
    workspace.give(text(pipe, "a red circle"))
    steps = workspace.run_scales(lambda _, shape: np.full(shape, noise, np.float32), GUIDED)
    for position, (calls, _) in enumerate(steps, start=1):
        expected = sign * position / np.sqrt(pipe.manifest.transformer.bits)
        np.testing.assert_allclose(workspace.summed_codes(calls), expected, rtol=1e-5)


def test_noise_is_asked_for_once_per_scale_with_its_shape(workspace: Workspace, pipe: Pipeline):
    workspace.give(text(pipe, "a red circle"))
    asked = []

    def noise(scale: int, shape: tuple[int, ...]) -> np.ndarray:
        asked.append((scale, shape))
        return half(scale, shape)

    list(workspace.run_scales(noise, GUIDED))
    assert asked == [(0, (1, 8)), (2, (16, 8)), (6, (256, 8))]


def test_weights_are_not_in_the_arena(workspace: Workspace):
    with pytest.raises(InternalError, match="is a weight"):
        workspace.read(workspace.layout.steps[0].sampling_head, "head.weight")
