"""The pipeline on a tiny random model: what must be equal, what must differ, and what its output tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL.Image import Image

from fastvar import Pipeline
from fastvar.core.noise import MAX_SEED
from fastvar.runtime.requests.settings import SamplingSettings
from tests.runtime.pipeline.drawing import PROMPT, SCALES, StoppedError, codes, in_threads, pixels, previews

# Reproducibility


def test_each_image_is_handed_over_when_it_is_complete(pipe: Pipeline):
    seen = []
    output = pipe(["a red circle", "a blue square"], seed=3, num_images=2, callback_on_image_end=seen.append)
    assert [result.image for result in seen] == output.images
    assert [(r.index, r.prompt, r.seed) for r in seen] == [
        (i, prompt, seed) for i, (prompt, seed) in enumerate(zip(output.prompts, output.seeds, strict=True))
    ]


def test_images_before_a_stop_were_handed_over(pipe: Pipeline):
    seen = []

    def stop(result):
        seen.append(result.image)
        raise StoppedError

    with pytest.raises(StoppedError):
        pipe(PROMPT, seed=7, num_images=3, callback_on_image_end=stop)
    assert len(seen) == 1


def test_same_seed_same_bits_whatever_was_drawn_between(pipe: Pipeline, tiny_bundle: Path, image: Image):
    assert image.size == (256, 256)
    assert len(image.getcolors(256 * 256)) > 100, "not a flat image"
    for _ in pipe.stream("a green triangle", seed=1, guidance_scale=9.0, tau=2.0):
        pass
    assert pixels(pipe(PROMPT, seed=7).images[0]) == pixels(image)
    assert pixels(Pipeline.load(tiny_bundle)(PROMPT, seed=7).images[0]) == pixels(image)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"prompt": "a green triangle"},
        {"guidance_scale": 9.0},
        {"guidance_scale": 1},
        {"tau": 0.1},
        {"top_p": 0.3},
        {"negative_prompt": "a white square"},
    ],
)
def test_every_setting_has_an_effect(pipe: Pipeline, change: dict[str, object]):
    assert previews(pipe, **{"seed": 7, **change})[-1] != previews(pipe, seed=7)[-1]


def test_every_scale_draws_its_own_noise_of_the_seed(pipe: Pipeline):
    """From seed to codes as documented, so that another program can draw the same image."""
    expected = codes(pipe, 2, 3.0)
    for position, _ in enumerate(pipe.stream(PROMPT, seed=7, guidance_scale=3.0, tau=1.0, top_p=0.97)):
        workspace = pipe._session._workspaces[2, 1]
        found = workspace.summed_codes(workspace.layout.steps[position])
        np.testing.assert_array_equal(found, expected[position])


def test_defaults_are_those_of_the_bundle(pipe: Pipeline):
    d = pipe.manifest.sampling
    given = {"guidance_scale": d.guidance_scale, "tau": d.tau, "top_p": d.top_p}
    assert previews(pipe, seed=7, **given) == previews(pipe, seed=7)


def test_top_p_of_zero_is_off_as_one_is(pipe: Pipeline):
    assert previews(pipe, seed=7, top_p=0) == previews(pipe, seed=7, top_p=1.0)
    assert SamplingSettings(3.0, 1.0, 0.0).scalars == SamplingSettings(3.0, 1.0, 1.0).scalars


def test_largest_seed(pipe: Pipeline):
    assert previews(pipe, seed=MAX_SEED) == previews(pipe, seed=MAX_SEED) != previews(pipe, seed=0)


def test_threads_sharing_a_pipeline_draw_what_each_draws_alone(pipe: Pipeline):
    jobs = [("a red circle", 1, 3.0), ("a blue square", 2, 1.0), ("a green triangle", 3, 3.0)]

    def draw(prompt: str, seed: int, guidance_scale: float) -> bytes:
        return pixels(pipe(prompt, seed=seed, guidance_scale=guidance_scale).images[0])

    alone = [draw(*job) for job in jobs]
    together = in_threads([lambda job=job: [draw(*job) for _ in range(2)] for job in jobs])
    assert together == [[drawn, drawn] for drawn in alone]


# Several images


def test_images_of_a_prompt_lie_together_and_seeds_count_up(pipe: Pipeline):
    prompts = ["a red circle", "a blue square"]
    out = pipe(prompts, seed=5, num_images=2)
    assert out.prompts == ["a red circle", "a red circle", "a blue square", "a blue square"]
    assert out.seeds == [5, 6, 5, 6]
    assert len(out.timings) == len(out.images) == 4
    assert len({pixels(image) for image in out.images}) == 4
    assert pixels(out.images[1]) == pixels(pipe("a red circle", seed=6).images[0])
    assert pixels(out.images[2]) == pixels(pipe("a blue square", seed=5).images[0])


def test_output_records_settings_and_timings(pipe: Pipeline):
    out = pipe(PROMPT, tau=0.5, guidance_scale=2, negative_prompt="a white square")
    assert out.settings == {
        "guidance_scale": 2,
        "tau": 0.5,
        "top_p": pipe.manifest.sampling.top_p,
        "negative_prompt": "a white square",
        "policy": "tiny",
        "model": "tiny",
        "size": "256x256",
    }
    (timing,) = out.timings
    assert [(s.index, s.size, s.tokens, s.kept) for s in timing.scales] == SCALES
    assert min(timing.text_ms, timing.decode_ms, *(s.ms for s in timing.scales)) > 0
    assert timing.total_ms == pytest.approx(timing.text_ms + timing.scales_ms + timing.decode_ms)


# Seeds that nobody chose


def test_a_seed_is_drawn_and_told(pipe: Pipeline):
    out = [pipe(PROMPT, num_images=2) for _ in range(2)]
    (first, second), other = out[0].seeds, out[1].seeds[0]
    assert second == first + 1
    assert first != other
    assert pixels(pipe(PROMPT, seed=second).images[0]) == pixels(out[0].images[1])
    stream = pipe.stream(PROMPT)
    assert [event.preview().tobytes() for event in stream] == previews(pipe, seed=stream.seed)
    assert stream.settings == {**out[0].settings, "seed": stream.seed}
