import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastvar.errors import CheckpointError
from fastvar.export.models.codebook.tokenizer import (
    LatentEncoder,
    Phi,
    VqTokenizer,
    area_pool,
    enlarge,
    infer_vq_tokenizer,
)
from fastvar.export.models.common.tokenizer_blocks import Attention, Downsample
from fastvar.export.tracing.torch_export import fused_attention
from fastvar.families.codebook import VAR_TOKENIZER, VqTokenizerConfig

GOLDEN = Path(__file__).parents[3] / "golden"
TINY = VqTokenizerConfig(16, 4, base_channels=32, channel_multipliers=(1, 2), residual_blocks=1, max_scales=3)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VqTokenizer(TINY).eval().requires_grad_(False)


def _shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_published_tokenizer_has_our_tensors_and_is_recognised():
    keys = json.loads(gzip.decompress((GOLDEN / "vq_tokenizer_keys.json.gz").read_bytes()))
    published = {name: tuple(shape) for name, shape in keys.items()}
    assert infer_vq_tokenizer(published) == VAR_TOKENIZER
    with torch.device("meta"):
        assert _shapes(VqTokenizer(VAR_TOKENIZER).state_dict()) == published


def test_sizes_are_read_off_the_decoding_side_alone(tokenizer):
    shapes = _shapes(tokenizer.state_dict())
    assert infer_vq_tokenizer(shapes) == TINY
    decoding = {name: shape for name, shape in shapes.items() if not name.startswith(("encoder.", "quant_conv."))}
    assert infer_vq_tokenizer(decoding) == TINY


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("quantize.embedding.weight", "no tensor quantize.embedding.weight"),
        ("decoder.up.1.block.0.conv1.weight", "no tensor decoder.up.1"),
        ("quantize.quant_resi.qresi_ls.3.weight", "3 phi convolutions"),
    ],
)
def test_what_is_no_such_tokenizer_is_refused(tokenizer, name, problem):
    shapes = _shapes(tokenizer.state_dict())
    del shapes[name]
    with pytest.raises(CheckpointError, match=problem):
        infer_vq_tokenizer(shapes)


def test_decoder_gives_the_published_image():
    recorded = {name: tensor.float() for name, tensor in load_file(GOLDEN / "vq_decoder.safetensors").items()}
    state = {name.removeprefix("weights."): t for name, t in recorded.items() if name.startswith("weights.")}
    model = VqTokenizer(infer_vq_tokenizer(_shapes(state))).eval().requires_grad_(False)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    image = (model.decode(recorded["f_hat"]) + 1) / 2
    torch.testing.assert_close(image, recorded["img_tl32"], atol=5e-6, rtol=0)


def test_a_latent_cell_is_a_patch_of_pixels_on_both_sides(tokenizer):
    latent = tokenizer.encode(torch.zeros(2, 3, 12, 8))
    assert latent.shape == (2, 4, 6, 4)
    image = tokenizer.decode(50 * torch.randn(1, 4, 6, 4, generator=torch.Generator().manual_seed(0)))
    assert image.shape == (1, 3, 12, 8)
    assert -1 <= image.min() < image.max() <= 1


def test_the_encoding_half_is_the_whole_tokenizers(tokenizer):
    half = LatentEncoder(TINY).eval().requires_grad_(False)
    state = {n: t for n, t in tokenizer.state_dict().items() if n.startswith(("encoder.", "quant_conv."))}
    half.load_state_dict(state)
    image = torch.rand(2, 3, 12, 8, generator=torch.manual_seed(0)) * 2 - 1
    assert torch.equal(half(image), tokenizer.encode(image))


def test_downsampling_pads_to_the_right_and_below():
    step = Downsample(1)
    torch.nn.init.ones_(step.conv.weight)
    torch.nn.init.zeros_(step.conv.bias)
    assert step(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]


@pytest.mark.parametrize("form", ["written out", "one operator"])
def test_attention_sees_every_cell_of_its_own_image(form):
    torch.manual_seed(0)
    module = Attention(32).eval().requires_grad_(False)
    if form == "one operator":
        module.attention = fused_attention
    x = torch.randn(2, 32, 3, 5)
    q, k, v = module.qkv(module.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # [B, L, C]
    seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(module(x), x + module.proj_out(seen), atol=1e-5, rtol=0)


def test_a_phi_keeps_half_of_what_it_is_given():
    phi = Phi(1, 0.5)
    torch.nn.init.ones_(phi.weight)
    torch.nn.init.constant_(phi.bias, 2.0)
    x = torch.zeros(1, 1, 3, 3)
    x[..., 0, 0] = 4.0
    assert phi(x)[0, 0].tolist() == [[5, 3, 1], [3, 3, 1], [1, 1, 1]]


def test_the_last_scale_is_smoothed_too_though_it_is_not_enlarged(tokenizer):
    codes = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    last = tokenizer.quantize.quant_resi.qresi_ls[3]
    assert torch.equal(tokenizer.quantize.contribution(codes, 2, 3, (3, 3)), last(codes))
    assert not torch.equal(last(codes), codes)


def test_quantising_a_sum_of_codes_gives_what_sums_to_it(tokenizer):
    """The last scale sees what the others have left: with one scale that is the nearest code of every cell."""
    quantizer = tokenizer.quantize
    token_map = torch.randint(16, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantizer.nearest(quantizer.lookup(token_map) + 1e-3), token_map)
    latent = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(3))
    token_maps, total = quantizer.quantize(latent, [(1, 1), (2, 2), (3, 4)])
    *_, summed = quantizer.sums([quantizer.lookup(m) for m in token_maps], (3, 4))
    assert [m.shape for m in token_maps] == [(2, 1, 1), (2, 2, 2), (2, 3, 4)]
    torch.testing.assert_close(summed, total)


def test_enlarging_is_bicubic_and_pooling_is_by_area():
    row = torch.tensor([[[[0.0, 1.0]]]])
    assert enlarge(row, (1, 2)) is row
    overshoot = enlarge(row, (1, 4))
    torch.testing.assert_close(overshoot.flatten(), torch.tensor([-0.10546875, 0.2265625, 0.7734375, 1.10546875]))
    assert area_pool(torch.tensor([[[[1.0, 2.0, 6.0]]]]), (1, 2)).flatten().tolist() == [1.5, 4.0]
