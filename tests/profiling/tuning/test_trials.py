"""Drawing and timing for a search, on bundles that are there: no policy is built here but one from the cache."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.core.policy import DENSE, PruningPolicy
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import InputError
from fastvar.export.rebuild import rebuild
from fastvar.profiling.tuning.metrics import psnr, ssim
from fastvar.profiling.tuning.search import Constraints
from fastvar.profiling.tuning.trials import Budget, Gallery, TuningSetup, tune_bundle
from tests.conftest import TINY_POLICY

OTHER = PruningPolicy("other")
SUBJECT = TuningSetup(("a red circle", "a blue square"), images=3, seed=4, runs=3)


@pytest.fixture
def bundles(tiny_bundle: Path, engine_cache: Path, tmp_path: Path) -> dict[str, Path]:
    """Policy name -> bundle: the tiny bundle stands for dense, one that keeps less for another policy."""
    (tmp_path / "other.toml").write_text(TINY_POLICY.replace("keep = 0.5", "keep = 0.25"))
    rebuild(tiny_bundle, tmp_path / "other", policy=str(tmp_path / "other.toml"), cache=engine_cache)
    return {"dense": tiny_bundle, "other": tmp_path / "other"}


def test_images_are_compared_at_equal_prompts_and_seeds(bundles: dict[str, Path]):
    heard = []

    def scorer(images, prompts):
        heard.append((len(images), images[0].dtype, images[0].shape, prompts))
        return 0.5 + len(heard) / 10

    gallery = Gallery(lambda policy: bundles[policy.name], SUBJECT, scorer)
    dense, other = gallery.judge(DENSE), gallery.judge(OTHER)
    prompts = ["a red circle", "a blue square", "a red circle"]
    drawn = {
        name: [np.asarray(pipe(p, seed=4 + i).images[0]) for i, p in enumerate(prompts)]
        for name, pipe in ((name, Pipeline.load(path)) for name, path in bundles.items())
    }
    pairs = list(zip(drawn["other"], drawn["dense"], strict=True))
    assert (dense.psnr_db, dense.ssim, dense.accuracy) == (float("inf"), pytest.approx(1), 0.6)
    assert other.psnr_db == np.median([psnr(*pair) for pair in pairs]) < 100
    assert other.ssim == np.mean([ssim(*pair) for pair in pairs])
    assert other.accuracy == 0.7
    assert heard == [(3, np.uint8, (256, 256, 3), prompts)] * 2


def test_a_policy_is_timed_in_turn_with_dense(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    gallery = Gallery(lambda policy: bundles[policy.name], SUBJECT)
    order = []
    spent = {"tiny": iter([900.0, 10, 30, 20]), "other": iter([900.0, 5, 7, 6])}  # the first run warms up

    def scales_ms(pipe: Pipeline, run: int) -> float:
        name = pipe.manifest.plan.policy.name
        order.append((name, run))
        return next(spent[name])

    monkeypatch.setattr(gallery, "_scales_ms", scales_ms)
    found = gallery.time(OTHER)
    assert (found.dense_ms, found.ms, found.runs, found.ratio) == (20, 6, 3, 0.3)
    assert order == [(name, run) for run in (-1, 0, 1, 2) for name in ("tiny", "other")]


def test_dense_takes_as_long_as_dense(bundles: dict[str, Path]):
    found = Gallery(lambda policy: bundles[policy.name], SUBJECT).time(DENSE)
    assert found.ratio == 1
    assert found.ms > 0


def test_timing_makes_do_with_fewer_runs_when_the_budget_is_gone(bundles: dict[str, Path]):
    long = TuningSetup(SUBJECT.prompts, images=1, runs=50)
    assert Gallery(lambda policy: bundles[policy.name], long, spent=lambda: 1.0).time(OTHER).runs == 3


@pytest.mark.parametrize("answer", [1.5, -0.1, float("nan"), "good", None])
def test_a_scorer_that_gives_no_share(bundles: dict[str, Path], answer: object):
    gallery = Gallery(lambda policy: bundles[policy.name], TuningSetup(("red",), images=1), lambda *_: answer)
    with pytest.raises(InputError, match="the scorer gave"):
        gallery.judge(DENSE)


@pytest.mark.parametrize("wrong", [{"prompts": ()}, {"images": 0}, {"runs": 2}])
def test_subjects_that_cannot_be_drawn(wrong: dict[str, object]):
    with pytest.raises(InputError):
        TuningSetup(**{"prompts": ("red",), "images": 1, **wrong})


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_budgets_that_are_none(minutes: float):
    with pytest.raises(InputError, match="budget"):
        Budget(minutes)


def test_a_budget_goes():
    budget = Budget(1e-9)
    assert budget.spent() > 1
    assert Budget(1000).spent() < 0.01


def test_a_bundle_without_a_text_encoder_is_refused_before_anything_is_built(tiny_bundle: Path):
    def build(policy: PruningPolicy) -> Path:
        raise AssertionError("built a bundle that cannot be drawn from")

    manifest = replace(Bundle.open(tiny_bundle).manifest, text_tokenizer=None)
    with pytest.raises(InputError, match="no text encoder"):
        tune_bundle(manifest, build, SUBJECT, Constraints())
