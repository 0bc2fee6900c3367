"""What a call is given: refused before anything is drawn, or read for what it means."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.core.noise import MAX_SEED
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import InputError, UnknownWordsWarning
from fastvar.runtime.output import ScaleEvent
from tests.runtime.pipeline.drawing import PROMPT, SCALES, pixels, previews


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
        ({"negative_prompt": ["white", "black"]}, "^negative_prompt is a list of 2, for 1"),
        ({"guidance_scale": "4"}, "^guidance_scale '4' is text"),
        ({"guidance_scale": True}, "^guidance_scale True is a bool"),
        ({"guidance_scale": [4, 5]}, "^guidance_scale is a list of 2, for 1"),
        ({"guidance_scale": 10**400}, "^guidance_scale is out of range"),
        ({"guidance_scale": 10**30}, "^guidance_scale 1e"),
        ({"tau": "1"}, "^tau '1' is text"),
        ({"top_p": np.array([0.5])}, r"^top_p array\(\[0\.5\]\) is a ndarray"),
        ({"seed": "7"}, "^seed '7'"),
        ({"seed": [1, 2]}, "^2 seeds for 1 prompts"),
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
