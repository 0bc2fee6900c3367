"""The pipeline on a tiny random model: what must be equal, what must differ, and what is refused."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL.Image import Image

from fastvar import Pipeline
from fastvar.core.noise import MAX_SEED, uniform_noise
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import BundleError, InputError, PipelineBusy, UnknownWordsWarning
from fastvar.runtime.inputs import TextInput
from fastvar.runtime.output import ScaleEvent
from fastvar.runtime.preview import Preview
from fastvar.runtime.session import Session
from fastvar.runtime.settings import SamplingSettings

PROMPT = "a red circle above a blue square"
SCALES = [(0, (1, 1), 1, 1), (2, (4, 4), 16, 16), (6, (16, 16), 256, 128)]  # index, size, tokens, kept


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle)


@pytest.fixture(scope="module")
def image(pipe: Pipeline) -> Image:
    """The image that others are compared with."""
    return pipe(PROMPT, seed=7).images[0]


def pixels(image: Image) -> bytes:
    assert image.mode == "RGB"
    return image.tobytes()


class StoppedError(Exception):
    """Ends a generation from its callback."""


def previews(pipe: Pipeline, **settings: object) -> list[bytes]:
    """Every scale of a generation, without the decoder."""
    settings.setdefault("seed", 0)
    return [event.preview().tobytes() for event in pipe.stream(settings.pop("prompt", PROMPT), **settings)]


def codes(pipe: Pipeline, rows: int, guidance_scale: float, seed: int = 7) -> list[np.ndarray]:
    """Summed codes after each scale, on engines for that number of rows."""
    workspace = Session(pipe.bundle).workspace(rows)
    workspace.encode_text(TextInput(pipe._subjects.tokenizer.encode(PROMPT)))
    settings = SamplingSettings(guidance_scale, 1.0, 0.97)
    steps = workspace.run_scales(lambda scale, shape: uniform_noise(seed, scale, shape), settings)
    return [workspace.summed_codes(calls).copy() for calls, _ in steps]


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
        workspace = pipe._session._workspaces[2]
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


def in_threads(jobs: list[Callable[[], object]]) -> list[object]:
    """Run jobs at once, started together."""
    results: list[object] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(position: int) -> None:
        start.wait()
        results[position] = jobs[position]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    return results


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


# Guidance


def test_one_row_equals_two_rows_at_guidance_1(pipe: Pipeline):
    """The unconditional row counts for nothing there: leaving it out must not change a bit."""
    for one, two in zip(codes(pipe, 1, 1.0), codes(pipe, 2, 1.0), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_guidance_1_runs_the_one_row_engines(tiny_bundle: Path):
    pipe = Pipeline.load(tiny_bundle)
    for guidance_scale in (1, 1.0):
        next(pipe.stream(PROMPT, guidance_scale=guidance_scale))
    assert {rows: w.layout.rows for rows, w in pipe._session._workspaces.items()} == {1: 1}
    loaded = pipe._session.engines._loaded
    assert any(name.endswith("-r1") for name in loaded)
    assert not any("-r2" in name for name in loaded), "engines that are not needed are not loaded"
    for guidance_scale in (0.0, 3.0, None):
        next(pipe.stream(PROMPT, guidance_scale=guidance_scale))
    assert sorted(pipe._session._workspaces) == [1, 2]


def test_guidance_0_ignores_the_prompt(pipe: Pipeline):
    """Only the negative prompt is left then."""
    negative = {"guidance_scale": 0, "negative_prompt": "a white square"}
    assert previews(pipe, prompt="a red circle", **negative) == previews(pipe, prompt="a blue square", **negative)


def test_negative_prompt_equal_to_the_prompt_cancels_guidance(pipe: Pipeline):
    same = {"negative_prompt": PROMPT, "seed": 7}
    assert previews(pipe, guidance_scale=4.0, **same) == previews(pipe, guidance_scale=2.0, **same)


def test_negative_prompt_without_guidance_is_refused(pipe: Pipeline):
    with pytest.raises(InputError, match="no effect at guidance_scale 1") as error:
        pipe(PROMPT, guidance_scale=1, negative_prompt="a white square")
    assert "raise guidance_scale" in error.value.fix


def test_bundle_built_for_guidance_only(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    sets = tuple(s for s in bundle.manifest.sets if s.rows == 2)
    pipe = Pipeline(replace(bundle, manifest=replace(bundle.manifest, sets=sets)))
    for draw in (pipe, pipe.stream):
        with pytest.raises(BundleError, match=r"^guidance_scale 1 switches guidance off, .* guidance only") as error:
            draw(PROMPT, guidance_scale=1)
        assert error.value.expected == "a guidance_scale other than 1"
        assert "--guidance both" in error.value.fix
    assert len(previews(pipe, guidance_scale=3)) == len(SCALES), "the other way still works"


def test_bundle_built_without_guidance(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    sets = tuple(s for s in bundle.manifest.sets if s.rows == 1)
    pipe = Pipeline(replace(bundle, manifest=replace(bundle.manifest, sets=sets)))
    for given, named in ((None, "guidance_scale 3, the default, draws"), (2, "guidance_scale 2 draws")):
        with pytest.raises(BundleError, match=named) as error:
            pipe(PROMPT, guidance_scale=given)
        assert "guidance_scale=1" in error.value.fix
    assert len(previews(pipe, guidance_scale=1)) == len(SCALES)


# Callback and stream


def test_callback_comes_once_per_executed_scale(pipe: Pipeline, image: Image):
    events: list[ScaleEvent] = []
    out = pipe(PROMPT, seed=7, callback_on_scale_end=events.append)
    assert [(e.index, e.size, e.tokens, e.kept) for e in events] == SCALES
    assert [e.ms for e in events] == [s.ms for s in out.timings[0].scales]
    assert pixels(out.images[0]) == pixels(image)


def test_callback_comes_for_every_image(pipe: Pipeline):
    indices: list[int] = []
    pipe(PROMPT, num_images=2, callback_on_scale_end=lambda event: indices.append(event.index))
    assert indices == [0, 2, 6] * 2


def test_callback_that_raises_leaves_the_pipeline_usable(pipe: Pipeline, image: Image):
    def stop(event: ScaleEvent) -> None:
        if event.index == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        pipe(PROMPT, callback_on_scale_end=stop)
    assert pixels(pipe(PROMPT, seed=7).images[0]) == pixels(image)


def test_callback_may_not_draw_with_its_own_pipeline(pipe: Pipeline):
    for draw in (lambda _: pipe(PROMPT), lambda _: next(pipe.stream(PROMPT)), lambda _: pipe.close()):
        with pytest.raises(PipelineBusy, match="this thread is inside it"):
            pipe(PROMPT, callback_on_scale_end=draw)


def test_callback_between_images_may_draw(pipe: Pipeline, image: Image):
    inner: list[bytes] = []
    out = pipe(PROMPT, seed=6, num_images=2, callback_on_image_end=lambda _: inner.extend(previews(pipe, seed=8)))
    assert pixels(out.images[1]) == pixels(image)
    assert inner == previews(pipe, seed=8) * 2


def test_previews_are_images_that_get_nearer(pipe: Pipeline):
    found = [event.preview() for event in pipe.stream(PROMPT, seed=7)]
    assert [(type(image).__name__, image.mode, image.size) for image in found] == [("Image", "RGB", (256, 256))] * 3
    assert len({pixels(image) for image in found}) == 3
    assert [len(image.getcolors(256 * 256)) > 1 for image in found] == [False, True, True], "one colour at 1x1"


def test_previews_stay_those_of_their_scale(pipe: Pipeline):
    own = previews(pipe, seed=7)
    events = list(pipe.stream(PROMPT, seed=7))
    kept: list[ScaleEvent] = []
    pipe(PROMPT, seed=7, callback_on_scale_end=kept.append)
    stream = pipe.stream(PROMPT, seed=7)
    left = [next(stream), next(stream)]
    del stream
    pipe("a green triangle", seed=1)
    for late in (events, kept, left):
        assert [event.preview().tobytes() for event in late] == own[: len(late)]


def test_codes_are_copied_for_those_who_can_still_ask(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    kept: list[Preview] = []
    keep = Preview.keep
    monkeypatch.setattr(Preview, "keep", lambda preview: (kept.append(preview), keep(preview)))
    pipe(PROMPT, callback_on_scale_end=lambda _: None)
    assert not kept, "the listener let every event go"
    pipe(PROMPT)
    assert not kept, "nobody listens"
    events: list[ScaleEvent] = []
    pipe(PROMPT, callback_on_scale_end=events.append)
    assert kept == [event.preview for event in events]


def test_drawing_between_the_events_of_a_stream(pipe: Pipeline, image: Image):
    """The stream is drawn to its end first, and its events wait."""
    undisturbed = previews(pipe, seed=8)
    stream = pipe.stream(PROMPT, seed=8)
    found = [next(stream).preview().tobytes()]
    assert pixels(pipe(PROMPT, seed=7).images[0]) == pixels(image)
    found += [event.preview().tobytes() for event in stream]
    assert found == undisturbed


def test_two_streams_step_by_step(pipe: Pipeline):
    pair = zip(pipe.stream(PROMPT, seed=7), pipe.stream(PROMPT, seed=8, guidance_scale=1), strict=True)
    found = [(a.preview().tobytes(), b.preview().tobytes()) for a, b in pair]
    assert [list(one) for one in zip(*found, strict=True)] == [
        previews(pipe, seed=7),
        previews(pipe, seed=8, guidance_scale=1),
    ]


def test_abandoned_streams_keep_nobody_waiting(pipe: Pipeline, image: Image):
    """Dropped, forgotten with its thread, or just not read on."""
    next(pipe.stream(PROMPT, seed=1))
    forgotten: list[Iterator[ScaleEvent]] = []

    def open_and_leave() -> None:
        forgotten.append(pipe.stream(PROMPT, seed=2))
        next(forgotten[0])

    in_threads([open_and_leave])
    assert pixels(pipe(PROMPT, seed=7, timeout=60).images[0]) == pixels(image)


def test_a_pool_smaller_than_its_requests(pipe: Pipeline):
    """All threads of the pool wait for a stream that only a thread of the pool could read on."""
    with ThreadPoolExecutor(2) as pool:
        stream = pipe.stream(PROMPT, seed=7)
        found = [pool.submit(next, stream).result()]
        others = [pool.submit(pipe, PROMPT, seed=seed) for seed in range(3)]
        while (event := pool.submit(next, stream, None).result(60)) is not None:
            found.append(event)
        images = [pixels(other.result(60).images[0]) for other in others]
    assert [event.preview().tobytes() for event in found] == previews(pipe, seed=7)
    assert images == [pixels(pipe(PROMPT, seed=seed).images[0]) for seed in range(3)]


def test_another_thread_waits_while_a_scale_is_drawn(pipe: Pipeline):
    """The time to wait counts; without one, it waits."""
    begun, go_on = threading.Event(), threading.Event()

    def hold(event: ScaleEvent) -> None:
        begun.set()
        go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pipe, PROMPT, seed=7, callback_on_scale_end=hold)
        assert begun.wait(60)
        with pytest.raises(PipelineBusy, match="a call draws an image that it began"):
            pipe(PROMPT, timeout=0.05)
        with pytest.raises(PipelineBusy):
            next(pipe.stream(PROMPT, timeout=0))
        second = pool.submit(previews, pipe, seed=8)
        go_on.set()
        assert first.result(60).seeds == [7]
        assert second.result(60) == previews(pipe, seed=8)


def test_pipelines_own_time_to_wait(tiny_bundle: Path):
    impatient = Pipeline.load(tiny_bundle, busy_timeout=0)
    stream = impatient.stream(PROMPT)
    next(stream)
    with pytest.raises(PipelineBusy, match=r"a stream opened \d+ s ago"):
        impatient(PROMPT)
    impatient(PROMPT, timeout=60)
    left: list[Iterator[ScaleEvent]] = []

    def leave_a_stream(_: object) -> None:
        left.append(impatient.stream(PROMPT, timeout=60))
        next(left[-1])

    assert len(impatient(PROMPT, num_images=3, callback_on_image_end=leave_a_stream).images) == 3, "begun is finished"


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


# Settings out of range


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"tau": 0}, "tau 0"),
        ({"tau": -1.0}, "tau -1"),
        ({"tau": float("nan")}, "tau nan"),
        ({"tau": 101}, "tau 101"),
        ({"top_p": -0.1}, r"top_p -0\.1"),
        ({"top_p": 1.01}, r"top_p 1\.01"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"guidance_scale": -0.1}, r"guidance_scale -0\.1"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"num_images": 0}, "num_images 0"),
        ({"num_images": 2.0}, r"num_images 2\.0"),
        ({"num_images": True}, "num_images True"),
        ({"num_images": 1025}, "num_images 1025"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"seed": MAX_SEED, "num_images": 2}, "seed 9223372036854775808"),
        ({"seed": 1.5}, r"seed 1\.5"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": ["a red circle", " "]}, "the prompt is empty"),
        ({"prompt": 7}, "the prompt is a int"),
        ({"prompt": None}, "no prompt given"),
        ({"prompt": b"a red circle"}, "the prompt is a bytes"),
        ({"prompt": "red " * 16}, "the prompt has 17 tokens"),
        ({"prompt": ["a red circle", "red " * 16]}, r"^prompt 2 of 2, 'red .*': the prompt has 17 tokens"),
        ({"prompt": ["a red circle", 7]}, "^prompt 2 of 2, 7: the prompt is a int"),
        ({"prompt": {"a red circle": 1}}, "is a dict"),
        ({"negative_prompt": "red " * 16}, "^the negative prompt has 17 tokens"),
        ({"negative_prompt": ["white"]}, "^the negative prompt is a list"),
        ({"guidance_scale": "4"}, "^guidance_scale '4' is text"),
        ({"guidance_scale": True}, "^guidance_scale True is a bool"),
        ({"guidance_scale": [4]}, r"^guidance_scale \[4\] is a list"),
        ({"guidance_scale": 10**400}, "^guidance_scale is out of range"),
        ({"guidance_scale": 10**30}, "^guidance_scale 1e"),
        ({"tau": "1"}, "^tau '1' is text"),
        ({"top_p": np.array([0.5])}, r"^top_p array\(\[0\.5\]\) is a ndarray"),
        ({"seed": "7"}, "^seed '7'"),
        ({"seed": [1]}, r"^seed \[1\]"),
        ({"num_images": "2"}, "^num_images '2'"),
        ({"num_images": np.float32(2)}, "^num_images .*2"),
        ({"callback_on_scale_end": "print"}, "^callback_on_scale_end 'print' cannot be called"),
        ({"callback_on_image_end": 7}, "^callback_on_image_end 7 cannot be called"),
        ({"timeout": -1}, "^timeout -1 is out of range"),
        ({"timeout": float("nan")}, "^timeout nan is out of range"),
        ({"timeout": "1"}, "^timeout '1' is text"),
    ],
)
def test_out_of_range(pipe: Pipeline, wrong: dict[str, object], named: str):
    drawn: list[ScaleEvent] = []
    with pytest.raises(InputError, match=named) as error:
        pipe(**{"prompt": PROMPT, "callback_on_scale_end": drawn.append, **wrong})
    assert error.value.expected
    assert not drawn, "nothing is drawn before everything is checked"


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": 0},
        {"top_p": 2},
        {"seed": -1},
        {"guidance_scale": 101},
        {"prompt": ""},
        {"prompt": ["a red circle"]},
        {"prompt": ("a red circle", "a blue square")},
        {"prompt": None},
        {"timeout": True},
    ],
)
def test_stream_out_of_range(pipe: Pipeline, wrong: dict[str, object]):
    with pytest.raises(InputError):
        next(pipe.stream(**{"prompt": PROMPT, **wrong}))
    assert len(previews(pipe)) == len(SCALES)


def test_numbers_of_numpy_are_numbers(pipe: Pipeline):
    numbers = {"guidance_scale": np.float32(2), "tau": np.array(0.5), "seed": np.uint8(7), "num_images": np.int64(1)}
    out = pipe(PROMPT, **numbers)
    assert pixels(out.images[0]) == pixels(pipe(PROMPT, guidance_scale=2, tau=0.5, seed=7).images[0])
    assert json.loads(json.dumps([out.settings, out.seeds]))[1] == [7]


@pytest.mark.parametrize(
    "several",
    [tuple, np.array, iter, lambda prompts: (prompt for prompt in prompts)],
)
def test_prompts_in_whatever_they_come(pipe: Pipeline, several: Callable[[list[str]], object]):
    out = pipe(several(["a red circle", "a blue square"]), seed=7)
    assert out.prompts == ["a red circle", "a blue square"]
    assert pixels(out.images[1]) == pixels(pipe("a blue square", seed=7).images[0])


@pytest.mark.parametrize("nothing", ["", " ", "\n", None])
def test_no_negative_prompt(pipe: Pipeline, nothing: str | None):
    assert previews(pipe, negative_prompt=nothing) == previews(pipe)
    out = pipe(PROMPT, negative_prompt=nothing, guidance_scale=1, seed=7)
    assert out.settings["negative_prompt"] is None


def test_words_that_the_tokenizer_does_not_know(pipe: Pipeline):
    prompts = ["a zorped circle", "\u4e00\u4e2a", "a red circle", "a zorped circle"]
    with pytest.warns(UnknownWordsWarning) as told:
        pipe(prompts, negative_prompt="blurry")
    assert [str(warning.message) for warning in told] == [
        "the tokenizer does not know: 'zorped' (prompt 'a zorped circle'); the image cannot follow them",
        "the tokenizer does not know: '\u4e00\u4e2a' (prompt '\u4e00\u4e2a'); nothing of the prompt is known",
        "the tokenizer does not know: 'blurry' (negative prompt); nothing of the negative prompt is known",
    ]
    assert {warning.filename for warning in told} == {__file__}, "where the prompt was given"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(PROMPT)


def test_bundle_without_text_encoder_cannot_read(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    pipe = Pipeline(replace(bundle, manifest=replace(bundle.manifest, text_encoder="", text_tokenizer=None)))
    with pytest.raises(InputError, match="no text encoder"):
        pipe(PROMPT)
