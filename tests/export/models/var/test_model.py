import gzip
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastvar.errors import CheckpointError
from fastvar.export.models.common.tensor_shapes import without_derived
from fastvar.export.models.var.model import DERIVED, Conditioning, VarTransformer, infer_transformer
from fastvar.families.var import TRANSFORMERS, VarConfig

GOLDEN = Path(__file__).parents[3] / "golden"
TINY = VarConfig(depth=2, width=64, heads=1, mlp_width=32, classes=3, codes=12, code_channels=4)


def _model(config):
    torch.manual_seed(0)
    model = VarTransformer(config).eval().requires_grad_(False)
    for tensor in model.parameters():
        tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model


def _shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_published_transformers_have_our_tensors_and_are_recognised(name):
    keys = json.loads(gzip.decompress((GOLDEN / f"{name}_keys.json.gz").read_bytes()))
    published = {key: tuple(shape) for key, shape in keys.items()}
    own = without_derived(published, DERIVED)
    assert set(published) - set(own) >= {"lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias"}
    assert infer_transformer(published) == infer_transformer(own) == TRANSFORMERS[name]
    with torch.device("meta"):
        assert _shapes(VarTransformer(TRANSFORMERS[name]).state_dict()) == own


@pytest.mark.parametrize("config", [TINY, replace(TINY, heads=4), replace(TINY, shared_modulation=True)])
def test_sizes_are_read_off_the_tensors(config):
    assert infer_transformer(_shapes(VarTransformer(config).state_dict())) == config


@pytest.mark.parametrize("heads", [1, 2, 4, 16])
def test_heads_that_no_tensor_tells_are_asked_for(heads):
    config = replace(TINY, heads=heads, unit_queries=False)
    shapes = _shapes(VarTransformer(config).state_dict())
    with pytest.raises(
        CheckpointError, match=r'do not say its heads[\s\S]*\{"heads": a whole number\} in config\.json'
    ):
        infer_transformer(shapes)
    assert infer_transformer(shapes, {"heads": heads}) == config
    with pytest.raises(CheckpointError, match="does not divide into 5 attention heads"):
        infer_transformer(shapes, {"heads": 5})


def test_published_sizes_without_their_scales_of_heads_are_no_published_model():
    """Of such a model nothing was published, so nothing says how many heads it has."""
    keys = json.loads(gzip.decompress((GOLDEN / "var_d16_keys.json.gz").read_bytes()))
    shapes = {key: tuple(shape) for key, shape in keys.items() if "scale_mul" not in key}
    with pytest.raises(CheckpointError, match="do not say its heads"):
        infer_transformer(shapes)
    assert infer_transformer(shapes, {"heads": 32}).heads == 32


def test_other_scales_of_as_many_tokens_are_taken_where_they_are_given(caplog):
    further = itertools.combinations(range(2, 20), 9)
    others = next(s for s in further if sum(side * side for side in s) == 679 and s != TINY.scales[1:])
    shapes = _shapes(VarTransformer(replace(TINY, scales=(1, *others))).state_dict())
    assert infer_transformer(shapes, {"scales": (1, *others)}).scales == (1, *others)
    assert caplog.text == ""
    assert infer_transformer(shapes).scales == TINY.scales
    assert f'to be the published {list(TINY.scales)}; if they are others, give "scales"' in caplog.text
    with pytest.raises(CheckpointError, match=r"680 tokens in 10 scales, its configuration says scales \[1, 2\]"):
        infer_transformer(shapes, {"scales": (1, 2)})


@pytest.mark.parametrize("name", ["classes", "depth", "codes", "heads", "mlp_width", "unit_queries"])
def test_settings_that_contradict_the_tensors_are_refused(name):
    shapes = _shapes(VarTransformer(TINY).state_dict())
    with pytest.raises(CheckpointError, match=f"tensors have {name} .*, its configuration says 7"):
        infer_transformer(shapes, {name: 7})


def test_scales_that_are_not_published_must_be_given():
    short = replace(TINY, scales=(1, 2, 3))
    shapes = _shapes(VarTransformer(short).state_dict())
    with pytest.raises(CheckpointError, match=r'14 tokens in 3 scales[\s\S]*"scales"'):
        infer_transformer(shapes)
    assert infer_transformer(shapes, {"scales": (1, 2, 3)}) == short


def test_another_model_is_refused():
    with pytest.raises(CheckpointError, match=r"no tensor word_embed\.weight"):
        infer_transformer({"cfg_uncond": (4, 8)})


def test_shared_modulation_is_one_layer_and_an_offset_per_block():
    own, shared = _model(TINY), _model(replace(TINY, shared_modulation=True))
    state = own.state_dict()
    for i, block in enumerate(shared.blocks):  # the offset of a block as a change of its bias
        state[f"blocks.{i}.ada_lin.1.weight"] = shared.shared_ada_lin[1].weight
        state[f"blocks.{i}.ada_lin.1.bias"] = shared.shared_ada_lin[1].bias + block.ada_gss.flatten()
    own.load_state_dict(state)
    labels = torch.tensor([0, 3])
    for one, other in zip(own.layers, shared.layers, strict=True):
        expected = one.modulation(own.conditioning(labels))
        shared.class_emb.load_state_dict(own.class_emb.state_dict())
        torch.testing.assert_close(other.modulation(shared.conditioning(labels)), expected)
        assert expected.shape == (6, 2, 1, 64)


def test_modulation_comes_in_the_published_order():
    block = _model(TINY).layers[0]
    conditioning = Conditioning(torch.randn(1, 64), None)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = block.ada_lin(conditioning.embedding).chunk(6, dim=-1)
    x = torch.randn(1, 3, 64)
    normed = F.layer_norm(x, (64,), eps=1e-6)
    expected = gamma2 * block.ffn(normed * (1 + scale2) + shift2)
    torch.testing.assert_close(block.feed_forward(x, conditioning), expected)
    q, k, v = block.attn.qkv(normed * (1 + scale1) + shift1)
    torch.testing.assert_close(block.project_qkv(x, conditioning), (q, k, v))
    torch.testing.assert_close(block.self_attention(q, k, v, conditioning), gamma1 * block.attn.attn_mlp(q, k, v))


@pytest.mark.parametrize("unit_queries", [True, False])
def test_queries_carry_the_scale_of_the_softmax(unit_queries):
    """Normalised ones that of their head, at most 100; others a quarter of the usual one."""
    attention = _model(replace(TINY, heads=4, unit_queries=unit_queries)).layers[0].attn
    h = torch.randn(2, 5, 64)
    if not unit_queries:
        expected = (F.linear(h, attention.mat_qkv.weight[:64]) + attention.q_bias) * 0.25 / math.sqrt(16)
        torch.testing.assert_close(attention.qkv(h)[0].transpose(1, 2).flatten(2), expected)
        return
    attention.scale_mul_1H11.copy_(torch.tensor([0.0, math.log(2), math.log(100), 9.0]).view(1, 4, 1, 1))
    q, k, _ = attention.qkv(h)
    torch.testing.assert_close(q.norm(dim=-1)[0, :, 0], torch.tensor([1.0, 2.0, 100.0, 100.0]))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 4, 5))


def test_keys_have_no_bias():
    attention = _model(replace(TINY, unit_queries=False)).layers[0].attn
    q, k, v = (t.flatten() for t in attention.qkv(torch.zeros(1, 1, 64)))
    assert torch.equal(k, torch.zeros(64))
    torch.testing.assert_close(v, attention.v_bias)
    torch.testing.assert_close(q, attention.q_bias / 32)


def test_every_scale_has_its_own_positions_and_level():
    model = _model(replace(TINY, scales=(1, 2, 3)))
    places = torch.cat([model.place(scale) for scale in range(3)], dim=1)
    levels = torch.cat([model.lvl_embed.weight[scale].expand(side * side, -1) for scale, side in enumerate((1, 2, 3))])
    torch.testing.assert_close(places, model.pos_1LC + levels)


def test_tokens_of_a_latent_are_row_major():
    model = _model(TINY)
    latent = torch.randn(1, 4, 2, 3)
    torch.testing.assert_close(model.embed(latent)[0, 4], model.word_embed(latent[0, :, 1, 1]))
