"""`fastvar build --from-bundle`: another policy, size or batch for a bundle that is there."""

import json
from pathlib import Path

import pytest


def test_another_policy(run, tiny_bundle, engine_cache, tmp_path):
    (tmp_path / "half.toml").write_text("".join(f"[scale.{scale}]\nskip = true\n" for scale in range(1, 6)))
    options = ("--from-bundle", tiny_bundle, "--policy", "half.toml", "--cache", engine_cache)
    code, out, err = run("build", *options, "--out", "other")
    assert (code, err) == (0, "")
    assert "2 copied" in out
    assert "the file of the other bundle" in out
    facts = json.loads(run("inspect", "other", "--json")[1])
    assert (facts["policy"]["name"], facts["skipped_scales"], facts["size"]) == ("half", [1, 2, 3, 4, 5], "256x256")


def test_another_batch(run, tiny_bundle, engine_cache):
    """The policy stays where none is given, and so do the numbers of images."""
    cached = ("--cache", engine_cache)
    code, out, err = run("build", "--from-bundle", tiny_bundle, *cached, "--batch", "2,4", "--out", "other")
    assert (code, err) == (0, "")
    assert "the file of the other bundle" in out
    facts, own = (json.loads(run("inspect", path, "--json")[1]) for path in ("other", tiny_bundle))
    assert [found["images"] for found in facts["batches"]] == [1, 2, 4]
    assert facts["policy"] == own["policy"]
    assert facts["skipped_scales"] == own["skipped_scales"] != []
    code, _, _ = run("build", "--from-bundle", "other", *cached, "--policy", "dense.toml", "--out", "again")
    assert code == 2, "there is no such policy"
    skips = "".join(f"[scale.{scale}]\nskip = true\n" for scale in range(1, 6))
    Path("ends.toml").write_text(skips)
    code, _, _ = run("build", "--from-bundle", "other", *cached, "--policy", "ends.toml", "--out", "again")
    assert code == 0
    again = json.loads(run("inspect", "again", "--json")[1])
    assert [found["images"] for found in again["batches"]] == [1, 2, 4]
    assert again["policy"]["name"] == "ends"


BAD_REBUILDS = {
    "does not go with --backend": ("--backend", "onnxruntime"),  # though it be the bundle's own
    "does not go with CHECKPOINT": ("checkpoint",),
    "does not go with --random-weights": ("--random-weights", "infinity_2b"),
    "does not go with --text-length, --guidance": ("--text-length", 8, "--guidance", "both"),
    "no policy 'sparse'": ("--policy", "sparse"),
    "no scale schedule for 1000x1000": ("--size", "1000x1000"),
    "Invalid value for '--jobs'": ("--jobs", 0),
    "--batch 'two' not understood": ("--batch", "two"),
    "whole numbers from 1 to 64": ("--batch", "65"),
}


@pytest.mark.parametrize("message", BAD_REBUILDS)
def test_bad_rebuild_is_told_plainly_and_leaves_nothing(run, tiny_bundle, tmp_path, message):
    code, out, err = run("build", "--from-bundle", tiny_bundle, *BAD_REBUILDS[message], "--out", "other")
    assert (code, out) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_not_rebuilt(run, tmp_path):
    code, _, err = run("build", "--from-bundle", "missing", "--out", "other")
    assert code == 2
    assert "is not a bundle" in err
