"""LoRA merged by the names in its file: nothing is left out, and nothing is guessed."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from fastvar.errors import CheckpointError, NumericsError
from fastvar.export.checkpoints.stored_numbers import PlainTensors
from fastvar.export.conversion.lora import Merged, read_changes

RANK, ALPHA = 4, 6.0
WEIGHTS = PlainTensors(
    {
        "blocks.0.attn.qkv.weight": torch.randn(12, 8, generator=torch.manual_seed(0)),
        "blocks.0.attn.qkv.bias": torch.zeros(12),
        "blocks.0.fc_1.weight": torch.randn(16, 8, generator=torch.manual_seed(1)).half(),
        "word_embed.weight": torch.randn(8, 3, generator=torch.manual_seed(2)),
        "conv.weight": torch.randn(6, 4, 3, 3, generator=torch.manual_seed(3)),
    }
)
QKV, FC = "blocks.0.attn.qkv", "blocks.0.fc_1"


def pair(module, rank=RANK):
    shape = WEIGHTS[f"{module}.weight"].shape
    generator = torch.manual_seed(len(module))
    up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)
    return torch.randn(rank, *shape[1:], generator=generator), up


def product(module, rank=RANK):
    down, up = pair(module, rank)
    return (up.flatten(1) @ down.flatten(1)).view(WEIGHTS[f"{module}.weight"].shape)


def peft(*modules, prefix="base_model.model."):
    return {f"{prefix}{m}.lora_{half}.weight": t for m in modules for half, t in zip("AB", pair(m), strict=True)}


def kohya(module, name, alpha=ALPHA):
    down, up = pair(module)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}


@pytest.fixture
def merged(tmp_path):
    def merge(state, config=None, scale=1.0):
        save_file(state, tmp_path / "adapter_model.safetensors")
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return Merged(WEIGHTS, read_changes(tmp_path / "adapter_model.safetensors", WEIGHTS, scale))

    return merge


def test_peft(merged, tmp_path):
    found = merged(peft(QKV, FC), {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}, scale=0.5)
    for module in (QKV, FC):
        weight = WEIGHTS[f"{module}.weight"]
        expected = (weight.float() + 0.5 * ALPHA / RANK * product(module)).to(weight.dtype)
        assert torch.equal(found[f"{module}.weight"], expected)
    for name in ("word_embed.weight", "blocks.0.attn.qkv.bias"):
        assert found[name] is WEIGHTS[name]
    folder = read_changes(tmp_path, WEIGHTS, 0.5)
    assert {name: change.factor for name, change in folder.items()} == dict.fromkeys(
        (f"{QKV}.weight", f"{FC}.weight"), 0.5 * ALPHA / RANK
    )


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(RANK)),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.qkv": 2}}, 2 / RANK),
        ({"lora_alpha": 8, "alpha_pattern": {"kv": 2}}, 8 / RANK),
    ],
)
def test_how_peft_scales(merged, config, factor):
    found = merged(peft(QKV), config)[f"{QKV}.weight"]
    assert torch.equal(found, WEIGHTS[f"{QKV}.weight"] + factor * product(QKV))


@pytest.mark.parametrize(
    "name", [QKV, f"lora_unet_{QKV.replace('.', '_')}", QKV.replace(".", "_"), f"transformer.{QKV}"]
)
def test_names_of_other_tools(merged, name):
    found = merged(kohya(QKV, name))[f"{QKV}.weight"]
    assert torch.equal(found, WEIGHTS[f"{QKV}.weight"] + ALPHA / RANK * product(QKV))


def test_names_that_have_underscores_themselves(merged):
    assert not torch.equal(merged(kohya(FC, "lora_unet_blocks_0_fc_1"))[f"{FC}.weight"], WEIGHTS[f"{FC}.weight"])


def test_convolutions(merged):
    found = merged(kohya("conv", "conv"))["conv.weight"]
    assert torch.allclose(found, WEIGHTS["conv.weight"] + ALPHA / RANK * product("conv"))


def refused(merged, match, state, config=None):
    with pytest.raises(CheckpointError, match=match):
        merged(state, config)


CONFIG = {"lora_alpha": 8}
ONE = torch.ones(1)
DOWN, UP = pair(QKV)


@pytest.mark.parametrize(
    ("match", "state", "config"),
    [
        (r"base_model\.model\.blocks\.7\.x\.lora_A\.weight changes no matrix", peft(QKV) | {
            "base_model.model.blocks.7.x.lora_A.weight": DOWN,
            "base_model.model.blocks.7.x.lora_B.weight": UP}, CONFIG),
        (r"holds .*lora_magnitude_vector, which is no part", peft(QKV) | {f"{QKV}.lora_magnitude_vector": ONE}, CONFIG),
        (r"holds blocks\.0\.attn\.qkv\.hada_w1_a, which", peft(QKV) | {f"{QKV}.hada_w1_a": ONE}, CONFIG),
        (r"half of a pair for blocks\.0\.attn\.qkv", {f"{QKV}.lora_A.weight": DOWN}, CONFIG),
        (r"of another shape|changes a matrix \[12, 4\] x \[3, 8\]", {
            f"{QKV}.lora_A.weight": DOWN[:3].clone(), f"{QKV}.lora_B.weight": UP}, CONFIG),
        (r"fc_1 changes a matrix \[12, 4\]", {f"{FC}.lora_A.weight": DOWN, f"{FC}.lora_B.weight": UP}, CONFIG),
        (r"says no alpha of .*qkv\n.*\n.*lora_alpha 4", peft(QKV), None),
        (r"lora_alpha is 'x'", peft(QKV), {"lora_alpha": "x"}),
        (r"use_dora True", peft(QKV), {**CONFIG, "use_dora": True}),
        (r"of type 'LOHA'", peft(QKV), {**CONFIG, "peft_type": "LOHA"}),
        (r"holds both .*lora_A\.weight and .*lora_down", peft(QKV, prefix="") | {
            f"{QKV}.lora_down.weight": DOWN}, CONFIG),
        (r"changes blocks\.0\.attn\.qkv\.weight twice", peft(QKV) | peft(QKV, prefix=""), CONFIG),
        (r"alpha has shape", kohya(QKV, QKV) | {f"{QKV}.alpha": torch.ones(3)}, None),
        (r"is torch\.int8", kohya(QKV, QKV) | {f"{QKV}.lora_down.weight": DOWN.to(torch.int8)}, None),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named(merged, match, state, config):
    refused(merged, match, state, config)


def test_two_weights_of_one_flat_name(tmp_path):
    weights = PlainTensors({"a.b_c.weight": torch.ones(12, 8), "a_b.c.weight": torch.ones(12, 8)})
    save_file(kohya(QKV, "lora_unet_a_b_c"), tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=r"any of a\.b_c\.weight, a_b\.c\.weight"):
        read_changes(tmp_path / "l.safetensors", weights)


def test_numbers_that_are_not_finite(merged):
    with pytest.raises(NumericsError, match="lora_up"):
        merged(kohya(QKV, QKV) | {f"{QKV}.lora_up.weight": UP * math.inf})
