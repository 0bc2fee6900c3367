"""Previews are of the decoder's colours: those of the demo's trained decoder, for codes that the fit has not seen."""

import torch
import torch.nn.functional as F

from fastvar.export.checkpoints.checkpoint import load_checkpoint
from fastvar.export.checkpoints.weight_sources import preview_weights
from fastvar.export.models.registry import adapter_of
from tests.conftest import REPOSITORY

GRID = 8


def test_an_even_area_has_about_the_decoders_colour():
    checkpoint = load_checkpoint(REPOSITORY / "demo" / "checkpoint")
    config, adapter = checkpoint.image_tokenizer, adapter_of(checkpoint.transformer)
    decoder = adapter.decoder(config, (GRID, GRID))
    prefix = adapter.decoder_prefix.removeprefix("image_tokenizer.")
    weights = {name: checkpoint.image_tokenizer_weights[prefix + name].float() for name in decoder.weights}
    fitted = {name: source.fetch() for name, source in preview_weights(checkpoint).items()}

    bits = torch.randint(0, 2, (8, config.code_channels, 2, 2), generator=torch.manual_seed(5)) * 2.0 - 1
    codes = F.interpolate(bits * 5 / config.code_channels**0.5, size=(GRID, GRID))
    with torch.no_grad():
        image = torch.cat([decoder(one[None], weights=weights) for one in codes]).clamp(-1, 1)
    colour = F.avg_pool2d(image, config.patch_size)
    shown = torch.einsum("cb,nbhw->nchw", fitted["preview.weight"], codes)
    shown = (shown + fitted["preview.bias"][:, None, None]).clamp(-1, 1)

    assert shown.std() > 0.7 * colour.std()  # no fog
    assert (shown - colour).square().mean().sqrt() < 0.65 * colour.std()
