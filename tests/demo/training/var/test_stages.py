"""The training programs of the class-conditional demo model, on a minute one; nothing here is trained for long."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.draw_scene import render
from demo.scenes import Scene, Shape
from demo.training.patch_codec import images_of
from demo.training.var.codec import (
    CLASSES,
    GRID_SIZES,
    TOKENIZER,
    VqCodec,
    class_scene,
    codec_loss,
    initialize,
    read_class,
    revive,
)
from demo.training.var.stages import Example, build, losses, make_examples, train_transformer, write_tokenizer
from fastvar.export.checkpoints.checkpoint import load_checkpoint
from fastvar.families.var import VarConfig

CONFIG = VarConfig(
    depth=1,
    width=32,
    heads=2,
    mlp_width=64,
    classes=len(CLASSES),
    codes=TOKENIZER.codes,
    code_channels=TOKENIZER.code_channels,
)


@pytest.fixture(scope="module")
def codec() -> VqCodec:
    torch.manual_seed(0)
    model = VqCodec().requires_grad_(False)
    initialize(model)
    return model


@pytest.fixture(scope="module")
def examples(codec: VqCodec) -> Example:
    return make_examples(codec, 4, seed=0)


def test_a_class_is_read_back_from_its_picture():
    rng = np.random.default_rng(0)
    for label in range(len(CLASSES)):
        assert read_class(render(class_scene(label, rng), rng=rng)) == label
    red, blue = (Shape("circle", color, "small", "plain", cell) for color, cell in (("red", "left"), ("blue", "right")))
    assert read_class(render(Scene("white", (red, blue), "left of"))) is None


def test_examples_hold_what_every_scale_sees_and_is_to_say(codec: VqCodec, examples: Example):
    assert examples.inputs.shape == (4, 679, 16)
    assert examples.targets.shape == (4, 680)
    small = examples.batch(2, 3, np.random.default_rng(0), CONFIG)
    assert small.inputs.shape == (2, 13, 16)
    assert small.targets.shape == (2, 14)
    maps = [
        targets.view(4, *size).long() for targets, size in zip(_by_scale(examples.targets), GRID_SIZES, strict=True)
    ]
    coarse = codec.sums(maps)[0].mean((2, 3))  # one code all over: its mean is what the second scale sees
    torch.testing.assert_close(examples.inputs[:, :4].float().mean(1), coarse, atol=2e-3, rtol=2e-3)


def _by_scale(targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return targets.split([height * width for height, width in GRID_SIZES], dim=1)


def test_unused_codes_go_where_residuals_lie(codec: VqCodec):
    rng = np.random.default_rng(0)
    images = images_of([class_scene(label, rng) for label in (0, 5)], rng)
    _, sums, maps = codec_loss(codec, images)
    hits = torch.bincount(torch.cat([m.flatten() for m in maps]), minlength=TOKENIZER.codes)
    model = VqCodec()
    model.load_state_dict(codec.state_dict())
    assert revive(model, codec.encode(images), sums, hits) == (hits == 0).sum() > 0
    before, after = codec.quantizer.embedding.weight, model.quantizer.embedding.weight
    assert torch.equal(before[hits > 0], after[hits > 0])
    better = (model.sums(model.token_maps(codec.encode(images)))[-1] - codec.encode(images)).square().mean()
    assert better < (sums[-1] - codec.encode(images)).square().mean()


def test_steps_lower_the_loss_of_what_they_are_taught(examples: Example):
    torch.manual_seed(0)
    model = build(CONFIG)
    batch = examples.batch(4, 5, np.random.default_rng(0), CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for _ in range(6):
        loss = torch.stack(losses(model, batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] == pytest.approx(np.log(CONFIG.codes), abs=0.5)  # knows nothing yet
    assert values[-1] < values[0] - 1


def test_what_training_writes_is_an_official_checkpoint(codec: VqCodec, tmp_path: Path):
    out = tmp_path / "var"
    write_tokenizer(codec, {}, out)
    train_transformer(1e-6, codec, CONFIG, images=4, out=out, states=tmp_path / "states")
    found = load_checkpoint(out)
    assert found.transformer == CONFIG
    assert found.image_tokenizer == TOKENIZER
    assert found.class_names is not None
    assert json.loads(found.class_names.read_text()) == CLASSES
    codebook = found.image_tokenizer_weights["quantize.embedding.weight"]
    assert torch.equal(codebook, codec.quantizer.embedding.weight.half())
