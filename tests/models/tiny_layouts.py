"""Tiny random models on disk, under the names and in the formats that the published ones have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, T5Config

from fastvar.export.checkpoints.checkpoint import image_tokenizer_shapes, transformer_shapes
from fastvar.export.checkpoints.random_weights import RandomWeights
from fastvar.export.checkpoints.text_encoders import text_encoder_shapes
from fastvar.export.models.registry import ADAPTERS
from fastvar.families.base import ImageTokenizerShape, TransformerShape
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.hart import HartConfig
from fastvar.families.infinity import ImageTokenizerConfig, TransformerConfig
from fastvar.families.var import VarConfig
from tests.conftest import TOKENIZER

INFINITY_2B = TransformerConfig(
    depth=2, width=64, heads=2, mlp_width=128, text_width=128, text_length=16, code_channels=8, chunks=2
)
INFINITY_8B = replace(INFINITY_2B, depth=4, code_channels=16, spatial_patchify=True)
IMAGES_16 = ImageTokenizerConfig(bits=8, base_channels=24, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=0)
IMAGES_8 = ImageTokenizerConfig(bits=4, base_channels=24, channel_multipliers=(1, 1, 1, 1), residual_blocks=0)
VAR = VarConfig(depth=1, width=64, heads=1, mlp_width=32, classes=3, codes=12, code_channels=4, scales=(1, 2, 3))
VQ = VqTokenizerConfig(codes=12, code_channels=4, base_channels=32, channel_multipliers=(1,), residual_blocks=1)
HART = HartConfig(
    depth=1,
    width=48,
    heads=3,
    mlp_width=256,
    context_length=6,
    context_width=32,
    codes=40,
    code_channels=4,
    scales=(1, 2),
    diffusion_width=16,
    diffusion_depth=1,
    diffusion_steps=2,
)
HART_IMAGES = replace(VQ, codes=40, max_scales=2)
# As the published program writes it; what it leaves out the tensors tell.
HART_SETTINGS = {"depth": 1, "embed_dim": 48, "num_heads": 3, "context_token": 6, "context_dim": 32}
HART_SETTINGS |= {"patch_nums": [1, 2], "attn_l2_norm": True, "disable_aln": True, "num_sampling_steps": "2"}
T5 = T5Config(vocab_size=40, d_model=128, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
State = Mapping[str, Tensor]


def transformer(config: TransformerShape, seed: int = 0) -> dict[str, Tensor]:
    return dict(RandomWeights(transformer_shapes(config), seed))


def images(config: ImageTokenizerShape, family: str, seed: int = 0) -> dict[str, Tensor]:
    return dict(RandomWeights(image_tokenizer_shapes(config, ADAPTERS[family]), seed))


def write_shards(folder: Path, state: State, *, pickled: bool, shards: int = 3) -> None:
    """As transformers splits a state dict."""
    folder.mkdir(parents=True)
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    places = {name: f"{stem}-{i % shards + 1:05}-of-{shards:05}{suffix}" for i, name in enumerate(state)}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in state.items() if places[name] == file}
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def write_t5(folder: Path) -> None:
    folder.mkdir(parents=True)
    T5.save_pretrained(folder)
    tied = "encoder.embed_tokens.weight"  # stored once, as shared.weight
    weights = {n: tensor for n, tensor in RandomWeights(text_encoder_shapes(T5)).items() if n != tied}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(TOKENIZER, folder / "tokenizer.json")


def write_qwen2(folder: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, **heads, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    folder.mkdir(parents=True)
    weights = dict(RandomWeights(text_encoder_shapes(config), dtype=torch.float32))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(config.to_json_string())
    (folder / "prefix.txt").write_text("a blue square")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<unk>", "padding_side": "right"}))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")


def infinity_2b(folder: Path, text_encoder: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(transformer(INFINITY_2B), folder / "infinity_2b_reg.pth")
    torch.save({"vae": images(IMAGES_16, "infinity")}, folder / "infinity_vae_d32reg.pth")
    if text_encoder:
        write_t5(folder / "flan-t5-xl")
    return folder


def infinity_8b(folder: Path, pickled: bool = True, text_encoder: bool = True) -> Path:
    write_shards(folder / "infinity_8b_weights", transformer(INFINITY_8B), pickled=pickled)
    (folder / "infinity_8b_weights" / "config.json").write_text(json.dumps({"apply_spatial_patchify": 1}))
    torch.save(images(IMAGES_8, "infinity"), folder / "infinity_vae_d56_f8_14_patchify.pth")
    if text_encoder:
        write_t5(folder / "flan-t5-xl")
    return folder


def infinity_125m(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(transformer(INFINITY_2B), folder / "infinity_125M_256x256.pth")
    torch.save({"vae": images(IMAGES_16, "infinity")}, folder / "infinity_vae_d16.pth")
    write_t5(folder / "flan-t5-xl")
    return folder


def var(folder: Path, seed: int = 0, depths: tuple[int, ...] = (16,), config: VarConfig = VAR) -> Path:
    """Models of some published depths by name; each has another seed."""
    folder.mkdir(parents=True)
    for more, depth in enumerate(depths):
        torch.save(transformer(config, seed + more), folder / f"var_d{depth}.pth")
    torch.save(images(VQ, "var"), folder / "vae_ch160v4096z32.pth")
    (folder / "config.json").write_text(json.dumps({"scales": list(config.scales), "heads": config.heads}))
    return folder


def hart(folder: Path, *, averaged: bool = True) -> Path:
    """llm/ as its program writes it, with an average of the weights beside them, and tokenizer/ with all it holds."""
    llm, tokenizer = folder / "llm", folder / "tokenizer"
    llm.mkdir(parents=True)
    tokenizer.mkdir()
    save_file(transformer(HART, 1), llm / "model.safetensors", {"format": "pt"})
    if averaged:
        torch.save(transformer(HART, 2), llm / "ema_model.bin")
    (llm / "config.json").write_text(json.dumps(HART_SETTINGS))
    held = {f"vae.{name}": tensor for name, tensor in images(HART_IMAGES, "hart").items()}
    save_file(held | {"discriminator.main.0.weight": torch.zeros(2)}, tokenizer / "model.safetensors", {"format": "pt"})
    (tokenizer / "config.json").write_text("{}")
    return folder
