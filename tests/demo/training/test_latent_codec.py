from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from demo.scenes import RICH, training_scenes
from demo.training.latent_codec import SCHEDULES, Images, LatentCodec, codec_losses, draw, draw_and_encode, quantize


@pytest.fixture(scope="module")
def images() -> Images:
    return draw(list(islice(training_scenes(3, RICH), 2)), (3,))


def test_both_sizes_show_the_same_scene_in_the_same_place(images: Images):
    assert images.small.shape[-1] == 256
    assert images.large.shape[-1] == 512
    assert (F.avg_pool2d(images.large, 2) - images.small).abs().mean() < 0.01


def test_the_small_latents_are_the_means_of_the_large_ones(images: Images):
    torch.manual_seed(0)
    with torch.no_grad():
        small, large = LatentCodec(bits=8, hidden=16).encode(images)
    assert large.shape == (2, 8, 32, 32)
    torch.testing.assert_close(F.avg_pool2d(large, 2), small)


def test_one_size_is_drawn_and_encoded_as_both_together(images: Images):
    torch.manual_seed(0)
    codec, scenes = LatentCodec(bits=8, hidden=16).requires_grad_(False), list(islice(training_scenes(3, RICH), 2))
    for side, image, latent in zip(SCHEDULES, images, codec.encode(images), strict=True):
        own = draw_and_encode(codec, scenes, (3,), side)
        assert torch.equal(own[0], image)
        assert torch.equal(own[1], latent)


def test_shared_scales_are_nearly_the_same_for_both_sizes():
    torch.manual_seed(1)
    small = F.interpolate(torch.randn(4, 8, 4, 4), size=(16, 16), mode="bilinear")
    large = F.interpolate(small, scale_factor=2, mode="nearest")
    shared = torch.full((4,), len(SCHEDULES[256]) - 1)
    sums = quantize(small, SCHEDULES[256], stop=shared), quantize(large, SCHEDULES[512], stop=shared)
    apart = (F.avg_pool2d(sums[1], 2) - sums[0]).square().mean() / sums[0].square().mean()
    assert apart < 0.1


def test_scales_bring_the_sum_nearer_to_the_latent():
    torch.manual_seed(2)
    latent = F.interpolate(2 * torch.randn(4, 8, 8, 8), size=(32, 32), mode="bilinear")
    stops = [torch.full((4,), stop) for stop in (3, 7, 10)]
    errors = [(quantize(latent, SCHEDULES[512], stop=stop) - latent).square().mean() for stop in stops]
    assert errors[0] > errors[1] > errors[2]


def test_a_few_steps_bring_the_loss_down(images: Images):
    torch.manual_seed(3)
    codec = LatentCodec(bits=8, hidden=64)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(12):
        loss = torch.stack(list(codec_losses(codec, images).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.8 * first
