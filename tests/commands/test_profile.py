"""`fastvar profile` from outside: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.fakes.tensorrt import fake_gpu_bundle

QUICK = ("--runs", 1, "--warm-up", 1)
FILES = ["profile.csv", "profile.json", "report.html", "trace.json"]
NO_GPU = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is a GPU")


def edited(source: Path, out: Path, **changes: object) -> Path:
    """A copy of a bundle with other entries in its manifest."""
    shutil.copytree(source, out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["checksum"]  # of a manifest that nobody edited
    (out / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return out


def test_profile_shows_and_writes(run, tiny_bundle, tmp_path):
    code, out, err = run("profile", tiny_bundle, *QUICK, "--memory", "15GiB", "--cfg", 1)
    assert (code, err) == (0, "")
    assert "6: 16x16" in out
    assert "128 of 256" in out
    assert "below the budget of 15.00 GiB" in out
    assert sorted(os.listdir(tmp_path)) == ["profile-tiny"]
    assert sorted(os.listdir(tmp_path / "profile-tiny")) == FILES
    found = json.loads((tmp_path / "profile-tiny" / "profile.json").read_text())
    assert found["settings"]["guidance_rows"] == 1
    assert found["speedup"] is None


def test_profile_against_another_as_json(run, tiny_bundle, tmp_path):
    """Without a text encoder in either."""
    textless = edited(tiny_bundle, tmp_path / "textless", text_encoder="", text_tokenizer=None)
    other = shutil.copytree(textless, tmp_path / "other")
    code, out, err = run("profile", textless, "--against", other, *QUICK, "--seed", 5, "--json", "-o", "new/report")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [bundle["label"] for bundle in found["bundles"]] == ["other", "textless"]
    assert {bundle["text"] for bundle in found["bundles"]} == {"random features"}
    assert found["settings"]["prompt"] is None
    assert found["speedup"]["image"] > 0
    assert json.loads((tmp_path / "new" / "report" / "profile.json").read_text()) == found
    code, out, err = run("profile", textless, *QUICK, "--prompt", "a circle")
    assert code == 2
    assert "has no text encoder" in err


def test_a_pass_of_several_images(run, batched_bundle):
    code, out, err = run("profile", batched_bundle, *QUICK, "--batch", 4, "--cfg", 1, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["settings"]["batch"] == 4
    code, out, err = run("profile", batched_bundle, *QUICK, "--batch", 3)
    assert (code, out) == (2, "")
    assert (
        "no engines for 3 images in one pass expected: one of [1, 2, 4] fix: rebuild with --batch 1,2,3,4"
        in " ".join(err.split())
    )


BAD_INPUTS = {
    "memory 'plenty' not understood": ("--memory", "plenty"),
    "Invalid value for '--runs'": ("--runs", 0),
    "Invalid value for '--warm-up'": ("--warm-up", 0),
    "--out file is not a folder": ("--out", "file"),
    "was not written by `fastvar profile`": ("--out", "taken"),
    "missing is not a bundle": ("--against", "missing"),
    "the prompt is empty": ("--prompt", "  "),
    "expected: at most 16": ("--prompt", "red " * 40),
    "seed -1 is out of range": ("--seed", -1),
    "guidance_scale nan": ("--cfg", "nan"),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_told_plainly_before_anything_is_measured(run, tiny_bundle, tmp_path, monkeypatch, message):
    from fastvar.profiling import profile

    def measures(*_arguments):
        raise AssertionError("measured what cannot be reported")

    monkeypatch.setattr(profile, "memory_run_apart", measures)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "report.html").write_text("<html>")
    code, out, err = run("profile", tiny_bundle, *BAD_INPUTS[message])
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ["file", "taken"]


def test_what_is_no_bundle(run, tmp_path):
    code, _, err = run("profile", "missing")
    assert code == 2
    assert "is not a bundle" in err
    assert list(tmp_path.iterdir()) == []


def test_another_size_is_not_compared(run, tiny_bundle, tmp_path):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    schedule = {**manifest["plan"]["schedule"], "rope_grid": [32, 32]}
    other = edited(tiny_bundle, tmp_path / "other", plan={**manifest["plan"], "schedule": schedule})
    code, _, err = run("profile", tiny_bundle, "--against", other)
    assert code == 2
    assert "other sizes" in err


@NO_GPU
def test_a_gpu_bundle_without_a_gpu(run, tiny_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("pynvml")
    code, _, err = run("profile", fake_gpu_bundle(tiny_bundle, tmp_path / "gpu"), *QUICK)
    assert code == 2
    assert "no NVIDIA driver" in err
    assert "Traceback" not in err
