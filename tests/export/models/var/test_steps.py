"""VAR's step graphs, run in torch from a bundle's own plan, against the readable reference."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar import Pipeline
from fastvar.core.noise import uniform_noise
from fastvar.core.plan import SamplingMode
from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.errors import InputError, PlanError
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.codebook.tokenizer import VqTokenizer
from fastvar.export.models.var.model import VarTransformer
from fastvar.export.models.var.reference import Noise, VarSampling, generate_scales
from fastvar.export.options import BuildOptions
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.var import VAR, VarConfig
from fastvar.runtime.requests.inputs import LabelInput
from fastvar.runtime.requests.settings import SamplingSettings
from tests.models.module_bundle import ModuleBundle

CONFIG = VarConfig(
    depth=3, width=64, heads=4, mlp_width=128, classes=10, codes=64, code_channels=8, scales=(1, 2, 3, 5, 8)
)
IMAGES = VqTokenizerConfig(
    codes=64, code_channels=8, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1
)
PRUNED = PruningPolicy("pruned", {3: ScaleRule(0.5), 4: ScaleRule(0.25)}, 1, 3, 2)
CASES = {
    "dense": (CONFIG, PruningPolicy("dense"), SamplingMode()),
    "pruned": (CONFIG, PRUNED, SamplingMode()),
    "guidance off at the end": (CONFIG, replace(PRUNED, rules={4: ScaleRule(0.25, guidance=False)}), SamplingMode()),
    "a scale left out": (CONFIG, replace(PRUNED, rules={3: ScaleRule(skip=True), 4: ScaleRule(0.5)}), SamplingMode()),
    "one modulation for all": (replace(CONFIG, shared_modulation=True, heads=2), PRUNED, SamplingMode()),
    "queries as they are": (replace(CONFIG, unit_queries=False), PRUNED, SamplingMode()),
    "smooth": (CONFIG, PRUNED, SamplingMode(smooth=True)),
}
# As few scales as show a cached one, one left out and a pruned one.
BUNDLED = replace(PRUNED, rules={1: ScaleRule(skip=True), 3: ScaleRule(skip=True), 4: ScaleRule(0.25)})
SEED = 9


def checkpoint(config: VarConfig):
    return random_checkpoint_for(config, IMAGES, dtype=torch.float32, name="tiny-var")


def reference(config, plan, sampling, label):
    """Scale by scale: what a trace remembers is overwritten by the next."""
    made = checkpoint(config)
    model, tokenizer = VarTransformer(config).eval(), VqTokenizer(IMAGES).eval()
    model.load_state_dict(dict(made.transformer_weights))
    tokenizer.load_state_dict(dict(made.image_tokenizer_weights))
    noise = Noise(
        uniform=lambda i, shape: torch.from_numpy(uniform_noise(SEED, i, (shape[1], 1))).view(shape),
        gumbel=lambda i, shape: torch.from_numpy(uniform_noise(SEED, i, shape[1:], "gumbel")).view(shape),
    )
    return generate_scales(model, tokenizer.quantize, torch.tensor([label]), plan, noise, sampling)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, engine_cache) -> Path:
    """A pruned bundle on onnxruntime, for images and errors."""
    out = tmp_path_factory.mktemp("var") / "bundle"
    names = out.with_name("class_names.json")
    names.write_text(json.dumps(["tench, Tinca tinca", "goldfish", *(f"class {i}" for i in range(2, 9)), "goldfish"]))
    made = replace(checkpoint(CONFIG), class_names=names)
    plan = VAR.plan(CONFIG.schedule, BUNDLED, CONFIG)
    build_bundle(made, plan, out, BuildOptions(guidance="on"), cache=engine_cache)
    return out


@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_chained_steps_draw_what_the_reference_draws(tmp_path, case, rows):
    config, policy, sampling_mode = CASES[case]
    plan = VAR.plan(config.schedule, policy, config, sampling_mode)
    settings = SamplingSettings(3.0 if rows == 2 else 0.0, None, 0.9, 20, VAR.guidance_off)
    workspace = ModuleBundle(checkpoint(config), plan, tmp_path).session().workspace(rows)
    workspace.give(LabelInput(3))
    sampling = VarSampling(settings.guidance_scale, 20, 0.9, sampling_mode.smooth)
    expected = reference(config, plan, sampling, 3)
    ran = workspace.run_scales(lambda *asked: uniform_noise(SEED, *asked), settings)
    for (calls, _), trace in zip(ran, expected, strict=True):
        logits = torch.from_numpy(workspace.read(calls.sampling_head, "logits").copy())
        torch.testing.assert_close(logits, trace.logits[0], atol=1e-4, rtol=1e-4)
        summed = torch.from_numpy(workspace.summed_codes(calls).copy())
        # Smooth mixing is colder and colder, so that rounding of logits shows.
        torch.testing.assert_close(summed, trace.summed[0], atol=5e-3 if sampling_mode.smooth else 1e-4, rtol=1e-4)
        for layer, kept in calls.kept.items():
            for name, view in kept.items():
                found = workspace.read_view(view) // calls.rows
                assert set(found[:: calls.rows]) == set(trace.states[layer].kept[name][0].tolist())


def test_images_of_numbers_and_names(bundle):
    pipe = Pipeline.load(bundle)
    found = pipe(class_labels=[1, "Tinca TINCA", "0"], seed=5)
    assert (found.prompts, found.draws) == (["1", "0", "0"], "class label")
    assert [image.size for image in found.images] == [(128, 128)] * 3
    assert found.images[1].tobytes() == found.images[2].tobytes() != found.images[0].tobytes()
    assert found.settings["top_k"] == 900
    again = pipe(class_labels=1, seed=5).images[0]
    assert again.tobytes() == found.images[0].tobytes()
    fewer = pipe(class_labels=1, seed=5, top_k=1).images[0]
    assert fewer.tobytes() != again.tobytes()
    assert fewer.tobytes() == pipe(class_labels=1, seed=6, top_k=1).images[0].tobytes(), "nothing is left to draw"
    for labels in (np.array([1]), np.int64(1), (1,), iter([1])):
        out = pipe(class_labels=labels, seed=5, top_k=np.int64(900), negative_prompt="")
        assert (out.prompts, out.images[0].tobytes()) == (["1"], again.tobytes())


def test_streams_and_images_are_one(bundle):
    pipe = Pipeline.load(bundle)
    *_, last = pipe.stream(class_label=1, seed=5)
    assert (last.size, last.kept) == ((8, 8), 16)
    assert last.preview().size == (128, 128)
    with pytest.raises(InputError, match=r"class_label \[1\] is a list"):
        pipe.stream(class_label=[1])


def test_every_command_takes_the_bundle(run, bundle, tmp_path):
    code, _, err = run("generate", bundle, "3", "tench", "--seed", "5", "--top-k", "50", "--out", tmp_path / "images")
    assert (code, err) == (0, "")
    files = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert files == ["0-5.png", "3-5.png"]
    assert Image.open(tmp_path / "images" / "3-5.png").text["class label"] == "3"
    code, out, _ = run("inspect", bundle)
    assert code == 0
    assert "tiny-var (var)" in out
    assert "one of 10 classes" in out
    code, out, _ = run("plan", bundle, "--json")
    assert code == 0
    code, out, err = run("profile", bundle, "--runs", 1, "--warm-up", 1, "--prompt", "tench", "--out", tmp_path / "p")
    assert code == 0, err
    rows = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert "layer condition" in json.dumps(rows)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({}, "no class label given"),
        ({"prompt": "a goldfish"}, "draw from class labels"),
        ({"class_labels": []}, "list of class labels is empty"),
        ({"class_labels": 10}, "a whole number from 0 to 9"),
        ({"class_labels": -1}, "class -1 is out of range"),
        ({"class_labels": True}, "class True is out of range"),
        ({"class_labels": 1.0}, r"class 1\.0 is out of range"),
        ({"class_labels": "\u00b2"}, "no class is named"),
        ({"class_labels": "9" * 30}, "no class is named"),
        ({"class_labels": [1, 2, 10]}, "^class label 3 of 3, 10: class 10 is out of range"),
        ({"class_labels": np.array([[1, 2]])}, r"^class \[1, 2\] is out of range"),
        ({"class_labels": {1, 2}}, "is a set"),
        ({"class_labels": "goldfish"}, "2 classes are named 'goldfish'"),
        ({"class_labels": "tinc"}, r"did you mean 0 \(tench\)"),
        ({"class_labels": 1, "negative_prompt": "fog"}, "read no negative prompt"),
        ({"class_labels": 1, "tau": 0.5}, "var models have no tau"),
        ({"class_labels": 1, "top_k": -1}, "top_k -1 is out of range"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_told(bundle, asked, problem):
    with pytest.raises(InputError, match=problem):
        Pipeline.load(bundle)(**asked)


def test_ways_of_drawing_that_other_families_have_are_refused():
    with pytest.raises(PlanError, match="var models do not know final iterations"):
        VAR.plan(CONFIG.schedule, PRUNED, CONFIG, SamplingMode(final_iterations=2))
