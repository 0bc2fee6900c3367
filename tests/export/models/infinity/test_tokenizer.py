from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastvar.errors import CheckpointError
from fastvar.export.models.common.tokenizer_blocks import WRAPPED, Downsample, ResidualBlock, Upsample, enlarge
from fastvar.export.models.infinity.tokenizer import ImageTokenizer, bits_to_codes
from fastvar.families.infinity import ImageTokenizerConfig

GOLDEN = load_file(Path(__file__).parents[3] / "golden/vae_quantiser.safetensors")
GRIDS = [(1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16)]
TINY = ImageTokenizerConfig(bits=6, base_channels=24, channel_multipliers=(1, 2, 2), residual_blocks=1)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return ImageTokenizer(TINY).eval().requires_grad_(False)


def test_quantiser_gives_the_published_bits_and_sum(tokenizer):
    bits, total = tokenizer.quantize(GOLDEN["h"], GRIDS)
    for index, found in enumerate(bits):
        expected = GOLDEN[f"s{index:02}.bits"].bool()
        assert torch.equal(found[0], expected.reshape(found[0].shape)), f"scale {index}"
    torch.testing.assert_close(total, GOLDEN["z"], atol=1e-5, rtol=0)


def test_the_sum_is_that_of_the_enlarged_codes(tokenizer):
    latent = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    bits, total = tokenizer.quantize(latent, [(1, 1), (3, 2), (6, 5)])
    codes = [enlarge(bits_to_codes(b.permute(0, 3, 1, 2)), (6, 5)) for b in bits]
    torch.testing.assert_close(sum(codes), total)


def test_quantiser_on_a_latent_worked_out_by_hand(tokenizer):
    """One bit: first the mean (positive: +1), then the sign of what is left."""
    latent = torch.tensor([[[[3.0, 0.5], [2.0, -1.0]]]])
    bits, total = tokenizer.quantize(latent, [(1, 1), (2, 2)])
    assert bits[0].flatten().tolist() == [True]
    assert bits[1].flatten().tolist() == [True, False, True, False]
    assert total.flatten().tolist() == [2.0, 0.0, 2.0, 0.0]


def test_a_code_lies_on_the_unit_sphere():
    codes = bits_to_codes(torch.tensor([[True, False, True, True]]))
    assert codes.tolist() == [[0.5, -0.5, 0.5, 0.5]]


def test_enlarging_to_the_same_size_changes_nothing_and_is_bilinear_otherwise():
    x = torch.tensor([[[[0.0, 1.0]]]])
    assert enlarge(x, (1, 2)) is x
    assert enlarge(x, (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (24, 24), (48, 24), (96, 32), (192, 32), (512, 32)])
def test_normalisation_groups(channels, groups):
    norm = WRAPPED.norm(channels).norm
    assert (norm.num_groups, norm.eps) == (groups, 1e-6)


def test_base_width_16_has_no_normalisation_groups():
    with pytest.raises(CheckpointError, match="16 channels"):
        ImageTokenizerConfig(bits=16, base_channels=16)


def test_downsampling_pads_right_and_bottom():
    down = Downsample(1, WRAPPED)
    _set(down.conv.conv, {(2, 2): 1.0})  # looks at the bottom right of its window
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert down(x).flatten().tolist() == [10.0, 0.0, 0.0, 0.0]


def test_upsampling_repeats_each_pixel():
    up = Upsample(1, WRAPPED)
    _set(up.conv.conv, {(1, 1): 1.0})
    assert up(torch.tensor([[[[1.0, 2.0]]]])).flatten().tolist() == [1, 1, 2, 2, 1, 1, 2, 2]


def test_a_residual_block_adds_to_its_input():
    block = ResidualBlock(32, 32, WRAPPED)
    _set(block.conv2.conv, {})
    x = torch.randn(1, 32, 3, 3)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("grid", [(2, 2), (3, 5)])
def test_sizes_through_encoder_and_decoder(tokenizer, grid):
    pixels = (grid[0] * 4, grid[1] * 4)
    latent = tokenizer.encoder(torch.zeros(2, 3, *pixels))
    assert latent.shape == (2, 6, *grid)
    assert tokenizer.decode(latent).shape == (2, 3, *pixels)


def test_a_decoded_image_is_clamped(tokenizer):
    codes = 50 * torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    raw, image = tokenizer.decoder(codes), tokenizer.decode(codes)
    raw_large = ImageTokenizer(TINY)
    raw_large.load_state_dict(tokenizer.state_dict())
    with torch.no_grad():
        raw_large.decoder.conv_out.conv.weight.mul_(100)
        image_large = raw_large.decode(codes)
    assert image_large.abs().max() == 1
    assert torch.equal(image, raw.clamp(-1, 1))


def _set(conv: nn.Conv2d, taps: dict[tuple[int, int], float]) -> None:
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        for (row, column), value in taps.items():
            conv.weight[0, 0, row, column] = value
    conv.requires_grad_(False)
