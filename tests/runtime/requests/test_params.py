"""Sampling parameters: every way to give them comes to the same, and what is wrong with them is said before drawing."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvar import BuildOptions, Pipeline, SamplingParams
from fastvar.errors import BuildError, InputError, RenamedWarning
from fastvar.runtime.requests.params import MIN_TAU

VALUES = {
    "guidance_scale": st.floats(0, 100),
    "tau": st.floats(0.01, 100),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 4096),
    "seed": st.integers(0, 2**63 - 1),
    "num_images": st.integers(1, 1024),
    "negative_prompt": st.sampled_from(["blue", None]),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_parameters_given_at_once_or_one_by_one_are_the_same(values: dict):
    found = SamplingParams()
    for name, value in values.items():
        found = found.changed(**{name: value})
    assert found == SamplingParams(**values)
    assert all(getattr(found, name) == value for name, value in values.items())


def test_numpy_scalars_become_plain_python():
    found = SamplingParams(np.float32(3), np.float64(0.5), np.float32(1), np.int64(4), np.uint8(7), np.int32(2))
    assert found == SamplingParams(3.0, 0.5, 1.0, 4, 7, 2)
    assert {type(getattr(found, field.name)) for field in fields(found)} <= {int, float, type(None)}


def test_temperature_is_tau_by_the_fields_name():
    assert SamplingParams().changed(temperature=0.5) == SamplingParams(tau=0.5)
    with pytest.raises(InputError, match="temperature and tau are the same parameter\nfix: give one of them"):
        SamplingParams().changed(temperature=0.5, tau=0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale nan is out of range"),
        ({"guidance_scale": 101}, "guidance_scale 101 is out of range"),
        ({"tau": 0}, "tau 0 is out of range"),
        ({"tau": 5e-324}, "tau 5e-324 is out of range"),
        ({"top_p": float("inf")}, "top_p inf is out of range"),
        ({"top_k": -1}, "top_k -1 is out of range"),
        ({"top_k": True}, "top_k True is out of range"),
        ({"seed": 2**63}, f"seed {2**63} is out of range"),
        ({"num_images": 0}, "num_images 0 is out of range"),
        ({"tau": "0.5"}, "tau '0.5' is text"),
    ],
)
def test_what_no_model_is_sampled_with_is_refused(values: dict, message: str):
    with pytest.raises(InputError, match=message):
        SamplingParams(**values)


def test_an_unknown_parameter_is_told_with_the_known_ones():
    with pytest.raises(InputError, match=r"no sampling parameter guidance\nexpected: some of guidance_scale, tau, "):
        SamplingParams().changed(guidance=3)


def test_they_are_frozen():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().seed = 3


def test_an_empty_negative_prompt_is_none():
    assert SamplingParams(negative_prompt=" ") == SamplingParams()


def test_a_call_takes_parameters_whole_by_name_or_both(tiny_bundle: Path):
    pipe = Pipeline.load(tiny_bundle)
    whole = pipe("a red circle", SamplingParams(guidance_scale=2.0, tau=0.5, seed=7, num_images=2))
    named = pipe("a red circle", guidance_scale=2.0, temperature=0.5, seed=7, num_images=2)
    both = pipe("a red circle", SamplingParams(guidance_scale=9.0, tau=0.5, seed=7, num_images=2), guidance_scale=2.0)
    assert whole.seeds == named.seeds == both.seeds == [7, 8]
    for others in (named, both):
        assert [np.array_equal(a, b) for a, b in zip(whole.images, others.images, strict=True)] == [True, True]
        assert others.settings == whole.settings


def test_what_is_no_parameters_is_told(tiny_bundle: Path):
    with pytest.raises(InputError, match="params 'blue' is a str\nexpected: SamplingParams"):
        Pipeline.load(tiny_bundle)("a red circle", "blue")


def test_a_stream_draws_one_image(tiny_bundle: Path):
    with pytest.raises(InputError, match="num_images 2 of a stream\nexpected: 1"):
        Pipeline.load(tiny_bundle).stream("a red circle", SamplingParams(num_images=2))


def test_options_of_a_build_by_old_and_unknown_names():
    with pytest.warns(RenamedWarning, match="the option drawing is named sampling_mode now"):
        assert BuildOptions().changed(drawing=None) == BuildOptions()
    with pytest.raises(BuildError, match="no option presicion\nexpected: some of size, policy"):
        BuildOptions().changed(presicion="bf16")
    with pytest.raises(BuildError, match="decoder tile True not understood"):
        BuildOptions(decoder_tile=True)


@pytest.mark.parametrize("tau", [MIN_TAU, 100])
@pytest.mark.parametrize("top_p", [0, 5e-324, 1 - 1e-16, 1])
@pytest.mark.parametrize("guidance_scale", [0, 1e-9, 1 + 1e-12, 100])
def test_whatever_is_in_range_draws_finite_numbers(tiny_bundle: Path, tau: float, top_p: float, guidance_scale: float):
    with Pipeline.load(tiny_bundle) as pipe:
        assert pipe("a red circle", tau=tau, top_p=top_p, guidance_scale=guidance_scale, seed=1).images
