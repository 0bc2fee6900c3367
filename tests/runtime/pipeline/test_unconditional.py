"""Images of no class, which guidance steers away from: it changes nothing there, and is left out where it can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fastvar
from fastvar import UNCONDITIONAL, Pipeline
from fastvar.errors import BundleError, InputError
from fastvar.export.models.var.model import VarTransformer
from fastvar.runtime.images.png import read_metadata
from tests.models import tiny_var

CLASSES = tiny_var.CONFIG.classes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """A pipeline of step modules for a way of guidance."""

    def pipe(guidance: str) -> Pipeline:
        return tiny_var.modules(tmp_path_factory.mktemp(guidance), guidance=guidance)

    return pipe


def pixels(pipe: Pipeline, **asked: object) -> np.ndarray:
    return np.asarray(pipe(**asked).images[0]).astype(int)


def test_it_is_drawn_from_the_row_behind_all_classes(made):
    """`pooled` is the class embedding after SiLU."""
    pipe, transformer = made("both"), VarTransformer(tiny_var.CONFIG)
    transformer.load_state_dict(dict(tiny_var.checkpoint().transformer_weights))
    table = transformer.class_emb.weight.detach()
    assert len(table) == CLASSES + 1
    for label, row in ((UNCONDITIONAL, CLASSES), (4, 4)):
        (request,) = pipe.requests.generation(class_labels=label, guidance_scale=0)
        workspace = pipe._session.workspace(1)
        workspace.give(request.given)
        pooled = torch.from_numpy(workspace.read(workspace.layout.conditioning, "pooled").copy())
        torch.testing.assert_close(pooled[0], torch.nn.functional.silu(table[row]))


def test_it_is_told_apart_from_all_classes(made):
    pipe = made("both")
    out = pipe(class_labels=[0, CLASSES - 1, UNCONDITIONAL], seed=5)
    assert out.prompts == ["0", "9", "unconditional"]
    assert len({image.tobytes() for image in out.images}) == 3
    assert fastvar.UNCONDITIONAL == "unconditional"
    for word in ("Unconditional", " unconditional "):
        assert pipe(class_labels=word, seed=5).prompts == ["unconditional"]
    with pytest.raises(InputError, match='class 10 is out of range\nexpected: a whole number from 0 to 9, or "uncond'):
        pipe(class_labels=CLASSES)


def test_guidance_changes_nothing_where_both_rows_are_equal(made):
    pipe = made("on")
    found = [pixels(pipe, class_labels=UNCONDITIONAL, seed=5, guidance_scale=scale) for scale in (0.5, 4.0, 20.0)]
    for other in found[1:]:
        assert np.abs(found[0] - other).max() <= 1
    assert np.abs(pixels(pipe, class_labels=3, seed=5, guidance_scale=20) - found[0]).max() > 20


def test_without_guidance_half_the_rows_are_run_by_default(made):
    pipe = made("both")
    out = pipe(class_labels=UNCONDITIONAL, seed=5)
    assert list(pipe._session._workspaces) == [(1, 1)]
    assert out.settings["guidance_scale"] == 0
    guided = pipe(class_labels=UNCONDITIONAL, seed=5, guidance_scale=4)
    assert sorted(pipe._session._workspaces) == [(1, 1), (2, 1)]
    assert guided.settings["guidance_scale"] == 4
    assert np.abs(np.asarray(out.images[0]).astype(int) - np.asarray(guided.images[0])).max() <= 1
    mixed = pipe(class_labels=[3, UNCONDITIONAL], seed=5)
    assert mixed.settings["guidance_scale"] == 4, "the default, for the class's sake"
    assert mixed.images[1].tobytes() == guided.images[0].tobytes()


def test_a_bundle_for_one_way_alone_draws_it_by_default(made):
    assert made("off")(class_labels=UNCONDITIONAL).settings["guidance_scale"] == 0
    assert made("on")(class_labels=UNCONDITIONAL).settings["guidance_scale"] == 4
    with pytest.raises(BundleError, match="guidance_scale 4 draws with guidance"):
        made("off")(class_labels=UNCONDITIONAL, guidance_scale=4)
    with pytest.raises(BundleError, match="guidance_scale 0 switches guidance off"):
        made("on")(class_labels=UNCONDITIONAL, guidance_scale=0)


def test_a_stream_draws_it_too(made):
    pipe = made("both")
    *_, last = pipe.stream(class_label=UNCONDITIONAL, seed=5)
    assert list(pipe._session._workspaces) == [(1, 1)]
    assert last.preview().size == (128, 128)


def test_from_the_command_line(run, var_editing_bundle: Path, tmp_path: Path):
    code, _, err = run("generate", var_editing_bundle, "unconditional", "--seed", 5)
    assert (code, err) == (0, "")
    told = read_metadata(tmp_path / "unconditional-5.png")
    assert told["class label"] == "unconditional"


def test_a_prompt_is_a_prompt(tiny_bundle: Path):
    """Models that read text read the word."""
    pipe = Pipeline.load(tiny_bundle)
    with pytest.warns(fastvar.errors.UnknownWordsWarning, match="unconditional"):
        out = pipe("unconditional", seed=1)
    assert out.settings["guidance_scale"] == 3
