from dataclasses import replace

import pytest
import torch

from fastvar.core.rotary import rotary_table
from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.random_weights import (
    BLOCK,
    RandomWeights,
    flan_t5_xl,
    random_checkpoint,
    random_checkpoint_for,
)
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.export.models.infinity.tokenizer import ImageTokenizer
from fastvar.export.models.transformer.pruning import LayerState, ScaleRun, run_block
from fastvar.families.infinity import TRANSFORMERS, ImageTokenizerConfig, TransformerConfig

MODEL = TransformerConfig(
    depth=32, width=64, heads=4, mlp_width=256, text_width=128, text_length=8, code_channels=16, chunks=4
)
IMAGES = ImageTokenizerConfig(bits=16, base_channels=24)


def test_the_real_size_is_described_but_not_made():
    found = random_checkpoint("infinity_2b")
    assert found.transformer == TRANSFORMERS["infinity_2b"]
    assert found.image_tokenizer.bits == 32
    assert found.text_encoder is None
    assert not found.text_encoder_weights
    assert len(found.transformer_weights) == 694
    weight = found.transformer_weights["head_nm.ada_lin.1.weight"]
    assert (weight.shape, weight.dtype) == ((4096, 2048), torch.float16)


def test_unknown_size():
    with pytest.raises(CheckpointError, match="infinity_8b"):
        random_checkpoint("infinity_3b")


def test_a_tensor_is_a_function_of_seed_and_name():
    shapes = {"a.weight": (8, 8), "b.weight": (8, 8)}
    one, same, other = RandomWeights(shapes, 0), RandomWeights(shapes, 0), RandomWeights(shapes, 1)
    assert torch.equal(one["a.weight"], same["a.weight"])
    assert not torch.equal(one["a.weight"], other["a.weight"])
    assert not torch.equal(one["a.weight"], one["b.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_past_the_random_block_still_differ(dtype):
    rows = BLOCK // 1024 + 10
    weight = RandomWeights({"x.weight": (rows, 1024)}, 0, dtype)["x.weight"]
    assert weight.dtype == dtype
    assert weight.float().std().item() == pytest.approx(1 / 32, rel=0.02)
    assert len(weight.unique(dim=0)) == rows


def test_activations_stay_in_range_of_half_precision_through_the_depth():
    checkpoint = random_checkpoint_for(MODEL, IMAGES, dtype=torch.float32)
    with torch.device("meta"):
        model = InfinityTransformer(MODEL).requires_grad_(False)
    model.load_state_dict(dict(checkpoint.transformer_weights), assign=True)
    torch.manual_seed(0)
    conditioning = model.conditioning(torch.randn(2, 8, 128), torch.ones(2, 8, dtype=torch.bool))
    run = ScaleRun((4, 4), 16, torch.from_numpy(rotary_table((4, 4), (4, 4), MODEL.head_dim)), None, False)
    x = model.embed(torch.randn(2, 16, 4, 4)) + model.lvl_embed.weight[3]
    for block in model.layers:
        x = run_block(block, x, conditioning, run, LayerState(), pruned_layer=False)
    assert 0.05 < x.std() < 20
    logits = model.logits(x, conditioning.sos)
    assert 0.1 < logits.std() < 10


def test_images_are_neither_flat_nor_all_clamped():
    checkpoint = random_checkpoint_for(MODEL, IMAGES, dtype=torch.float32)
    with torch.device("meta"):
        tokenizer = ImageTokenizer(IMAGES).requires_grad_(False)
    tokenizer.load_state_dict(dict(checkpoint.image_tokenizer_weights), assign=True)
    torch.manual_seed(0)
    image = tokenizer.decode(torch.randn(1, 16, 2, 2))
    assert image.std() > 0.1
    assert (image.abs() < 1).float().mean() > 0.2


def test_digest_tells_seeds_and_sizes_apart():
    digests = {
        random_checkpoint_for(config, IMAGES, seed=seed).digest
        for config in (MODEL, replace(MODEL, depth=16))
        for seed in (0, 1)
    }
    assert len(digests) == 4
    assert random_checkpoint_for(MODEL, IMAGES).digest in digests


def test_text_encoder_is_flan_t5_xl_on_request():
    found = random_checkpoint("infinity_2b", text_encoder=True)
    weights = found.text_encoder_weights
    assert found.text_encoder.d_model == flan_t5_xl().d_model == 2048
    assert sum(shape.numel() for shape in map(torch.Size, weights.shapes.values())) > 1_200_000_000
    assert weights["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"].shape == (5120, 2048)
    tied = ("shared.weight", "encoder.embed_tokens.weight")
    assert torch.equal(*(RandomWeights(dict.fromkeys(tied, (4, 4)))[name] for name in tied))
