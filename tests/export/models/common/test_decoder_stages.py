"""Stages chained by hand over stripes give what the whole decoder gives, whatever the tile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvar.core.precision import Precision
from fastvar.engines.registry import get_backend
from fastvar.export.models.common.coders import image_tokenizer_role
from fastvar.export.models.common.decoder_stages import (
    FirstConv,
    SecondConv,
    ShortcutFirstConv,
    Stage,
    Tiling,
    decoder_stages,
    merged,
    statistics_of,
)
from fastvar.export.models.common.step_graph import WeightShape
from fastvar.export.models.common.weights import Role
from fastvar.export.models.infinity.tokenizer import Decoder
from fastvar.export.tracing.onnx import trace
from fastvar.families.infinity import ImageTokenizerConfig
from tests.models.stage_chain import tiled

CONFIGS = {
    "24 groups": ImageTokenizerConfig(bits=6, base_channels=24, channel_multipliers=(1, 1), residual_blocks=1),
    "32 groups, shortcuts": ImageTokenizerConfig(5, 32, (1, 2, 2), 1),
    "wider again": ImageTokenizerConfig(4, 32, (2, 1, 3), 0),
    "one level": ImageTokenizerConfig(4, 24, (1,), 2),
    "five levels": ImageTokenizerConfig(4, 24, (1, 2, 4, 4, 4), 0),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads of torch wait for each other at every one of these small operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder(config: ImageTokenizerConfig) -> Decoder:
    """Weights and biases large enough to show in every norm; an image that is not all clamped."""
    torch.manual_seed(0)
    made = Decoder(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    made.conv_out.conv.weight.mul_(0.5)
    return made


def codes(config: ImageTokenizerConfig, grid: tuple[int, int]) -> Tensor:
    """Brighter towards the bottom: the statistics of one stripe are not those of another."""
    slope = torch.linspace(0.2, 3, grid[0]).view(-1, 1)
    return torch.randn(1, config.bits, *grid, generator=torch.Generator().manual_seed(1)) * slope


@pytest.mark.parametrize("tile", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("name", CONFIGS)
def test_stripes_are_the_whole_decoder(name: str, tile: int):
    """Five latent rows: a remainder under 2 and 3, one stripe under 5 and more."""
    config = CONFIGS[name]
    model, summed = decoder(config), codes(config, (5, 3))
    expected = model(summed).clamp(-1, 1)
    assert expected.std() > 0.02
    assert (expected.abs() < 1).float().mean() > 0.5
    torch.testing.assert_close(tiled(model, config, summed, tile), expected, atol=1e-4, rtol=0)


SMALL = ImageTokenizerConfig(bits=2, base_channels=24, channel_multipliers=(1, 2), residual_blocks=0)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 4), tile=st.integers(1, 12))
def test_any_tile_of_any_latent(height: int, width: int, tile: int):
    model, summed = decoder(SMALL), codes(SMALL, (height, width))
    expected = model(summed).clamp(-1, 1)
    torch.testing.assert_close(tiled(model, SMALL, summed, tile), expected, atol=1e-4, rtol=0)


@given(height=st.integers(1, 300), rows=st.integers(1, 400))
def test_stripes_cover_the_latent_in_order(height: int, rows: int):
    stripes = Tiling(height, rows).stripes
    assert sum(stripes) == height
    assert set(stripes[:-1]) <= {rows}
    assert 1 <= stripes[-1] <= rows


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_survive_a_large_offset(offset: float):
    """E[x^2] - E[x]^2 would give a variance of noise here: fp32 holds 1e8 to no better than 8."""
    x = offset + torch.randn(40, 48, 9, generator=torch.Generator().manual_seed(0))
    parts = x.split((16, 16, 8))
    shares = torch.tensor([16, 16, 8]) / 40
    mean, variance = merged(*torch.stack([statistics_of(part) for part in parts]).unbind(1), shares)
    exact = x.double().reshape(40, 24, -1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact.var(1, correction=0), rtol=2e-3, atol=0)


def test_statistics_are_of_what_is_stored():
    """Rounded to 16 bits first: what the next stage normalises is what was measured."""
    x = torch.randn(4, 24, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(statistics_of(x), statistics_of(x.float()))
    assert statistics_of(x).dtype == torch.float32


def test_blocks_of_one_shape_are_one_stage():
    """The published decoder: 20 different stages, whatever the number of blocks."""
    plans = list(decoder_stages(ImageTokenizerConfig(bits=32)))
    assert len({(p.factory, p.channels, p.scale) for p in plans}) == 20
    assert [p.factory for p in plans].count(FirstConv) == [p.factory for p in plans].count(SecondConv) == 15


def test_every_weight_of_the_decoder_is_used_once():
    for config in CONFIGS.values():
        used = [
            f"{plan.layer}.{name}" if plan.layer else name
            for plan in decoder_stages(config)
            for name in plan.factory.weights
        ]
        assert sorted(used) == sorted(Decoder(config).state_dict())


# 16 bits, and the compiler


def in_16_bits(model: Decoder) -> Decoder:
    """Weights in the types that a bundle stores them in."""
    for name, parameter in model.named_parameters():
        role = image_tokenizer_role(f"decoder.{name}")
        parameter.data = parameter.data.to(getattr(torch, role.dtype(Precision("bfloat16"))))
    return model


@pytest.mark.parametrize("tile", [2, 5])
def test_in_16_bits_stripes_stay_as_close_to_fp32_as_the_whole_decoder_does(tile: int):
    config = CONFIGS["32 groups, shortcuts"]
    summed = codes(config, (5, 3))
    expected, half = decoder(config)(summed).clamp(-1, 1), in_16_bits(decoder(config))
    whole, stripes = half(summed).clamp(-1, 1), tiled(half, config, summed, tile)
    assert stripes.dtype == torch.float32
    assert 0 < distance(stripes, expected) < 1.3 * distance(whole, expected) < 0.05


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("factory", [FirstConv, ShortcutFirstConv])
def test_no_fp32_copy_of_a_stripe_is_stored_between_kernels(factory: type[Stage]):
    """Scratch memory holds the normalised input, and each convolution's output before it is laid out as rows."""
    pytest.importorskip("tensorrt_rtx")
    channels, rows, width, own = (64, 32), 128, 1024, 10 << 20  # own: what the compiler takes at any size
    stage = factory(channels if factory is ShortcutFirstConv else (64, 64), rows, width, Tiling(8, 2))
    read, written = stage.channels
    shapes = {"conv1.conv.weight": (written, read, 3, 3), "nin_shortcut.conv.weight": (written, read, 1, 1)}
    weights = {
        name: WeightShape(
            shapes.get(name, (read if "norm" in name else written,)), Role.FP32 if "norm" in name else Role.COMPUTE
        )
        for name in stage.weights
    }
    graph = trace(stage, weights, Precision("bfloat16"))
    report = get_backend("tensorrt-rtx").build(graph.graph, "sm86").report
    assert report.kernels <= 13
    outputs = 2 if factory is ShortcutFirstConv else 1
    assert report.scratch_bytes < 2 * width * (rows + 2) * (read + outputs * written) + own
