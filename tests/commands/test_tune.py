"""`fastvar tune` from outside; the search itself is tested beside it."""

import json
from pathlib import Path

import pytest

from fastvar.core.policy import PruningPolicy
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.rebuild import rebuild
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import schedule_for
from fastvar.profiling.tuning.rebuilder import ONE_IMAGE, Rebuilder
from tests.conftest import TINY_POLICY


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue square \n")
    return path


@pytest.fixture
def built(tiny_bundle: Path, engine_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the policies asked for. One that keeps less stands for dense, and the budget ends behind the bundle's
    own: nothing is built."""
    asked: list[str] = []
    (tmp_path / "other.toml").write_text(TINY_POLICY.replace("keep = 0.5", "keep = 0.25"))
    rebuild(tiny_bundle, tmp_path / "other", policy=str(tmp_path / "other.toml"), cache=engine_cache)

    def build(_self, policy):
        asked.append(policy.name)
        return {"dense": tmp_path / "other", "tiny": tiny_bundle}[policy.name]

    monkeypatch.setattr(Rebuilder, "build", build)
    return asked


def test_it_writes_what_it_found(run, tiny_bundle, prompts, built, tmp_path):
    (tmp_path / "rating.py").write_text("def rate(images, prompts):\n    return 0.25 * len(prompts)\n")
    options = ("--prompts", prompts, "--budget-minutes", 1e-6, "--runs", 3, "--scorer", "rating:rate", "--out", "found")
    code, out, _ = run("tune", tiny_bundle, *options, "--min-accuracy", 1)
    assert code == 0
    assert set(built) == {"dense", "tiny"}
    data = json.loads((tmp_path / "found" / "tune.json").read_text())
    assert [trial["policy"]["name"] for trial in data["trials"]] == ["dense", "tiny"]
    assert data["trials"][0]["psnr_db"] is None
    assert data["trials"][1]["psnr_db"] > 0
    assert data["trials"][1]["accuracy"] == 0.5
    assert data["subject"]["prompts"] == ["a red circle", "a blue square"]
    assert f"best: {data['best']}" in out
    assert "tried with one image" not in out
    assert data["batches_of_bundle"] == [1]
    assert {"best.toml", "tune.svg", "tune.json", "front"} == {path.name for path in (tmp_path / "found").iterdir()}
    schedule = schedule_for((256, 256))
    members = {path.stem: INFINITY.policy(str(path), schedule, 2) for path in (tmp_path / "found" / "front").iterdir()}
    assert sorted(members) == sorted(data["front"])
    assert "dense" in members
    best = INFINITY.policy(str(tmp_path / "found" / "best.toml"), schedule, 2)
    assert best.rules == members[data["best"]].rules


def test_a_bundle_of_several_batches_is_tried_with_one_image(
    run, batched_bundle, prompts, engine_cache, tmp_path, monkeypatch
):
    """Policies are rebuilt for passes of one image alone, and it says so."""
    tried: list[list[int]] = []
    (tmp_path / "other.toml").write_text(TINY_POLICY.replace("keep = 0.5", "keep = 0.25"))

    def build(self: Rebuilder, policy: PruningPolicy) -> Path:
        """As its process does; of policies but two."""
        out = tmp_path / f"tried-{policy.name}"
        stand_in = {"dense": str(tmp_path / "other.toml"), "tiny": policy}[policy.name]
        rebuild(self._bundle, out, policy=stand_in, batch=ONE_IMAGE, cache=engine_cache)
        tried.append([own.images for own in Bundle.open(out).manifest.sets])
        return out

    monkeypatch.setattr(Rebuilder, "build", build)
    options = ("--prompts", prompts, "--budget-minutes", 1e-6, "--runs", 3, "--out", "found")
    code, out, _ = run("tune", batched_bundle, *options)
    assert code == 0
    assert tried
    assert all(images == [1, 1] for images in tried)
    assert "tried with one image a pass, of the bundle's 1, 2, 4" in " ".join(out.split())
    data = json.loads((tmp_path / "found" / "tune.json").read_text())
    assert (data["batch"], data["batches_of_bundle"]) == (1, [1, 2, 4])


BAD = {
    "cannot read prompts from missing.txt": ("--prompts", "missing.txt"),
    "empty.txt holds no prompt": ("--prompts", "empty.txt"),
    "not UTF-8": ("--prompts", "binary.txt"),
    "a budget of 0.0 minutes": ("--budget-minutes", 0),
    "--min-accuracy needs an accuracy": ("--min-accuracy", 0.9),
    "--min-ssim 2.0 is out of range": ("--min-ssim", 2),
    "scorer 'rate' not understood": ("--scorer", "rate"),
    "cannot import the scorer's module 'nowhere'": ("--scorer", "nowhere:rate"),
    "'json' has no function 'rate'": ("--scorer", "json:rate"),
    "expected: a function": ("--scorer", "json:__name__"),
    "Invalid value for '--images'": ("--images", 0),
    "cannot write": ("--out", "prompts.txt/new"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_told_plainly_and_leaves_nothing(run, tiny_bundle, prompts, tmp_path, message):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.iterdir())
    code, _, err = run("tune", tiny_bundle, "--prompts", prompts, *BAD[message])
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "tuning"] == before


def test_what_is_no_bundle(run, prompts):
    code, _, err = run("tune", "missing", "--prompts", prompts)
    assert code == 2
    assert "is not a bundle" in err
