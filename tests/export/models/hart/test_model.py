"""HART's transformer: official names, sizes from names, rotary positions, diffusion steps."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.checkpoint import transformer_shapes
from fastvar.export.models.codebook.tokenizer import VqTokenizer, infer_vq_tokenizer
from fastvar.export.models.common.tensor_shapes import without_derived
from fastvar.export.models.hart.diffusion import sampled_timesteps
from fastvar.export.models.hart.model import (
    DERIVED,
    HartTransformer,
    context_rotary,
    image_rotary,
    infer_transformer,
    rotate,
)
from fastvar.families.hart import IMAGE_TOKENIZER, TRANSFORMERS, HartConfig, mlp_width

GOLDEN = Path(__file__).parents[3] / "golden"
PUBLISHED = TRANSFORMERS["hart_0.7b"]
TINY = HartConfig(
    depth=2,
    width=128,
    heads=2,
    mlp_width=256,
    context_length=10,
    context_width=24,
    codes=40,
    code_channels=4,
    scales=(1, 2, 3),
    diffusion_width=32,
    diffusion_depth=1,
)


def published_keys(name):
    keys = json.loads(gzip.decompress((GOLDEN / f"{name}_keys.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in keys.items()}


def test_official_names_load_onto_the_transformer():
    keys = published_keys("hart_0.7b")
    config = infer_transformer(keys)
    assert config == PUBLISHED
    with torch.device("meta"):
        model = HartTransformer(config)
        state = {name: torch.empty(shape) for name, shape in without_derived(keys, DERIVED).items()}
    model.load_state_dict(state, assign=True)
    assert transformer_shapes(config) == without_derived(keys, DERIVED)
    assert set(keys) - set(without_derived(keys, DERIVED)) == {
        "lvl_1L",
        "attn_bias_for_masking",
        *(f"blocks.{layer}.attn.zero_k_bias" for layer in range(24)),
    }


def test_official_names_load_onto_the_tokenizer():
    keys = published_keys("hart_tokenizer")
    assert infer_vq_tokenizer(keys) == IMAGE_TOKENIZER
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in keys.items()}
        VqTokenizer(IMAGE_TOKENIZER).load_state_dict(state, assign=True)


def test_the_published_size_has_the_published_number_of_parameters():
    count = sum(torch.Size(shape).numel() for shape in transformer_shapes(PUBLISHED).values())
    assert round(count / 1e6, 1) == 732.4
    assert mlp_width(64) == 256


@pytest.mark.parametrize(
    "changes",
    [
        {"unit_queries": False},
        {"modulated": True},
        {"timestep_levels": False},
        {"context_norm": False},
        {"pooling": "avg", "diffusion_steps": 4, "context_length": 7},
    ],
    ids=str,
)
def test_sizes_are_read_off_the_tensors(changes):
    config = replace(TINY, **changes)
    untraced = {"scales": config.scales, "pooling": config.pooling, "diffusion_steps": config.diffusion_steps}
    settings = {**untraced, "context_length": config.context_length}
    if not config.unit_queries:
        settings["heads"] = config.heads
    assert infer_transformer(transformer_shapes(config), settings) == config


@pytest.mark.parametrize(
    ("changes", "left_out", "asked"),
    [
        ({"unit_queries": False, "heads": 4}, "heads", '"heads": a whole number'),
        ({}, "scales", r'"scales": \[1, 2, \.\.\.\]'),
        ({}, "context_length", '"context_length": a whole number'),
        ({"modulated": True, "pooling": "avg"}, "pooling", '"pooling": a text'),
    ],
)
def test_what_no_tensor_tells_is_asked_for(changes, left_out, asked):
    config = replace(TINY, **changes)
    names = ("heads", "scales", "context_length", "pooling", "diffusion_steps")
    settings = {name: getattr(config, name) for name in names}
    assert infer_transformer(transformer_shapes(config), settings) == config
    del settings[left_out]
    with pytest.raises(CheckpointError, match=rf"do not say its {left_out.replace('_', ' ')}, [\s\S]*{asked}"):
        infer_transformer(transformer_shapes(config), settings)


def test_the_published_model_needs_no_configuration_and_may_have_one():
    shapes = transformer_shapes(PUBLISHED)
    assert infer_transformer(shapes) == PUBLISHED
    assert infer_transformer(shapes, {"diffusion_steps": 4}) == replace(PUBLISHED, diffusion_steps=4)
    buffers = {"lvl_1L": (1, PUBLISHED.context_length + sum(side * side for side in PUBLISHED.scales[1:]) + 1)}
    with pytest.raises(CheckpointError, match="made for 14 scales and 9751 tokens"):
        infer_transformer({**shapes, **buffers})


def test_the_schedules_buffer_tells_the_context_length():
    shapes = {**transformer_shapes(TINY), "lvl_1L": (1, 10 + 4 + 9)}
    assert infer_transformer(shapes, {"scales": (1, 2, 3)}).context_length == 10
    with pytest.raises(CheckpointError, match="context_length 10, its configuration says 11"):
        infer_transformer(shapes, {"scales": (1, 2, 3), "context_length": 11})


def test_what_does_not_belong_together_is_refused():
    shapes = transformer_shapes(replace(TINY, timestep_levels=False))
    with pytest.raises(CheckpointError, match="made for 3 scales"):
        infer_transformer(shapes)
    with pytest.raises(CheckpointError, match="depth 2, its configuration says 3"):
        infer_transformer(shapes, {"scales": (1, 2, 3), "depth": 3})
    with pytest.raises(CheckpointError, match="shared by all blocks"):
        infer_transformer({**shapes, "blocks.0.ada_gss": (1, 1, 6, 128)})
    with pytest.raises(CheckpointError, match="no tensor word_embed"):
        infer_transformer({})


def test_queries_have_their_heads_length_at_most_100_and_keys_have_one():
    model = HartTransformer(TINY)
    attention = model.layers[0].attn
    with torch.no_grad():
        attention.scale_mul_1H11.copy_(torch.tensor([4.7, 1.0]).view(1, 2, 1, 1))
        q, k, _ = attention.qkv(torch.randn(1, 3, 128))
    assert torch.allclose(q.norm(dim=-1)[0], torch.tensor([100.0, math.e]).expand(3, 2).t(), rtol=1e-5)
    assert torch.allclose(k.norm(dim=-1), torch.ones(1, 2, 3))


def test_a_scales_number_is_embedded_as_cosines_then_sines():
    embedding, seen = HartTransformer(TINY).lvl_embed, []
    embedding.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedding(torch.tensor([3, 7]))
    frequencies = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat(((7 * frequencies).cos(), (7 * frequencies).sin()))
    assert torch.allclose(seen[0][1].double(), expected, atol=1e-5)


def test_context_features_are_normed_where_the_model_does():
    model, plain = HartTransformer(TINY), HartTransformer(replace(TINY, context_norm=False))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("context_norm.")})
    features, mask = torch.randn(1, 10, 24), torch.ones(1, 10, dtype=torch.bool)
    with torch.no_grad():
        model.context_norm.weight.fill_(2.0)
        normed = 2 * features / features.square().mean(-1, keepdim=True).sqrt()
        found, expected = (m.conditioning(f, mask, mask.long()) for m, f in ((model, features), (plain, normed)))
    assert torch.allclose(found.context, expected.context, atol=1e-4)


def test_context_positions_turn_pairs_of_halves():
    """Attention between two tokens depends on how far they lie apart, and on nothing else."""
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.manual_seed(0))

    def score(first: int, second: int) -> float:
        turned = [rotate(t, context_rotary(torch.tensor([[at]]), 16)) for t, at in ((q, first), (k, second))]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 8) == pytest.approx(score(10, 15), abs=1e-5)
    assert score(3, 8) != pytest.approx(score(3, 9), abs=1e-3)


def test_image_positions_are_fractional_offset_and_turn_each_half_by_its_own_angle():
    table = image_rotary((2, 3), (4, 4), torch.tensor([0, 5]), 8)
    assert table.shape == (2, 2, 6, 8)
    row, column = 2 + 5, 2 * 4 / 3 + 5  # of the last token, in the second row of the table
    x = torch.randn(8, generator=torch.manual_seed(0))
    angles = torch.tensor([row, row / 100, row, row / 100, column, column / 100, column, column / 100])
    turned = torch.cat((-x[4:], x[:4]))
    expected = x * angles.cos() + turned * angles.sin()
    last = rotate(x.expand(2, 1, 1, 8), table[:, :, 5:])
    assert torch.allclose(last[1, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [0]), (4, [0, 333, 666, 999]), (8, [0, 143, 285, 428, 571, 714, 856, 999])]
)
def test_sampled_timesteps(steps, expected):
    assert sampled_timesteps(steps) == expected
