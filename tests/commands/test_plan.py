"""`fastvar plan` on the published sizes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TWO_B = ("plan", "--model", "infinity_2b")


def test_2k_under_15_gib_fits_with_its_timeline(run):
    code, out, _ = run(*TWO_B, "--size", "2048x2048", "--policy", "fastvar", "--memory", "15GiB")
    assert code == 0
    assert "fits 15.00 GiB as it is" in out
    for row in ("text", "conditioning", "0 1x1", "8 24x24", "14 128x128", "decoder"):
        assert f"\n {row} " in out


def test_1024_under_9_gib_fits(run):
    code, out, _ = run(*TWO_B, "--memory", "9GiB", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["fits"]
    assert facts["allocated"]["total_bytes"] <= 9 * 2**30
    assert facts["timeline"][-1]["what"] == "decoder"
    assert facts["workspace_estimated"]


def test_dense_2k_is_refused_with_the_reason_and_what_would_fit(run):
    code, out, err = run(*TWO_B, "--size", "2048x2048", "--policy", "dense", "--memory", "15GiB")
    assert code == 2
    assert "14 128x128" in out, "the timeline is shown all the same"
    assert "keys and values alone take 16.58 GiB at scale 14, 128x128" in err
    assert "--policy fastvar" in err
    assert "Traceback" not in err


def test_choices_are_made_in_order_to_fit(run):
    code, out, _ = run(*TWO_B, "--memory", "8GiB", "--guidance", "on")
    assert code == 0
    assert "with text encoder offloaded" in out
    assert "fastvar generate --offload-text-encoder" in out


def test_a_bundle_is_planned_as_it_is(run, tiny_bundle: Path):
    code, out, _ = run("plan", tiny_bundle, "--json")
    facts = json.loads(out)
    assert code == 0
    assert not facts["workspace_estimated"]
    assert facts["budget_bytes"] is None
    assert facts["allocated"]["library_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "infinity_9b"), "no model size"),
        ((), "nothing to plan"),
        (("--model", "infinity_2b", "--size", "1000x1000"), "no scale schedule for 1000x1000"),
        (("--model", "infinity_2b", "--memory", "much"), "not understood"),
        (("--model", "infinity_2b", "--memory", "0GiB"), "not understood"),
        (("--model", "infinity_2b", "--size", "256", "--memory", "1MiB"), "choose a smaller model or a larger budget"),
        (("--model", "infinity_2b", "--backend", "cuda"), "no backend 'cuda'"),
        (("--model", "infinity_2b", "--policy", "none.toml"), "no policy"),
        (("--model", "infinity_2b", "--guidance", "maybe"), "not understood"),
        (("missing",), "no checkpoint missing"),
    ],
)
def test_bad_input(run, arguments: tuple[str, ...], told: str):
    code, _, err = run("plan", *arguments)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


def test_a_built_bundle_takes_no_build_options(run, tiny_bundle: Path):
    code, _, err = run("plan", tiny_bundle, "--policy", "dense")
    assert code == 2
    assert "--policy cannot change a bundle that is built" in err


def test_a_precision_that_the_backend_does_not_compute_in_is_refused(run):
    code, out, err = run("plan", "--model", "infinity_2b", "--backend", "onnxruntime", "--precision", "bf16")
    assert (code, out) == (2, "")
    assert "onnxruntime does not compute in bfloat16" in err


def test_a_gpu_by_name_takes_what_the_library_allocates_there(run):
    """Neither is the arena given scratch memory that AOTInductor does not use, nor is its own forgotten."""
    options = (
        "--model",
        "infinity_2b",
        "--size",
        "1024x1024",
        "--backend",
        "aotinductor",
        "--precision",
        "bf16",
        "--json",
    )
    code, out, _ = run("plan", *options, "--target", "cuda-sm90")
    on_gpu = json.loads(out)
    code, out, _ = run("plan", *options)
    on_cpu = json.loads(out)
    assert code == 0
    assert on_gpu["allocated"]["arena_bytes"] == on_cpu["allocated"]["arena_bytes"]
    assert 64 << 20 < on_gpu["allocated"]["library_bytes"] < on_cpu["allocated"]["library_bytes"]


# Passes of several images

SMALL_BATCH = ("plan", "--model", "infinity_layer12", "--size", "256x256")


@pytest.mark.slow
def test_the_largest_batch_that_fits_is_told(run):
    code, out, _ = run(*SMALL_BATCH, "--batch", "2", "--memory", "9GiB", "--json")
    facts = json.loads(out)
    assert (code, facts["images"], facts["fits"]) == (0, 2, True)
    largest = facts["largest_batch"]
    assert 2 <= largest <= 64
    for batch, fits in ((largest, True), (largest + 1, False)):
        if batch <= 64:
            assert (run(*SMALL_BATCH, "--batch", batch, "--memory", "9GiB")[0] == 0) == fits


def test_launches_of_an_image_are_told(run):
    code, out, _ = run(*SMALL_BATCH, "--batch", "2,8")
    assert code == 0
    told = " ".join(out.split())
    assert "engine launches an image: " in told
    facts = json.loads(run(*SMALL_BATCH, "--batch", "2,8", "--guidance", "on", "--json")[1])
    launches = {own["images"]: own for own in facts["launches"]}
    assert list(launches) == [1, 2, 8]
    assert launches[1]["engines"] < launches[8]["engines"] < 1.1 * launches[1]["engines"], "texts and decoders alone"
    for images, own in launches.items():
        assert own["engines_an_image"] == own["engines"] / images
        assert f"{own['engines_an_image']:,.0f} in a pass of {images}" in told
    assert "launches an image" not in run(*SMALL_BATCH)[1], "of one image a pass there is nothing to compare"


def test_fewer_images_are_the_smallest_change(run):
    _, out, _ = run(*SMALL_BATCH, "--batch", "8", "--json")
    need = json.loads(out)["allocated"]["total_bytes"]
    code, _, err = run(*SMALL_BATCH, "--batch", "64", "--memory", need)
    assert code == 2
    assert "the smallest change that fits: --batch" in err


@pytest.mark.parametrize("batch", ["0", "1,,2", "two", "-1", "1.5"])
def test_a_batch_that_is_none(run, batch: str):
    code, _, err = run(*SMALL_BATCH, f"--batch={batch}")
    assert code == 2
    assert f"--batch '{batch}' not understood" in err
    assert "Traceback" not in err


def test_a_batch_that_is_too_large(run):
    code, _, err = run(*SMALL_BATCH, "--batch", "65")
    assert code == 2
    assert "whole numbers from 1 to 64" in err
