"""A HART checkpoint as files: read, built, and drawn from, against the reference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastvar
from fastvar.core.noise import uniform_noise
from fastvar.core.policy import DENSE
from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.checkpoint import load_checkpoint
from fastvar.export.checkpoints.random_weights import RandomWeights
from fastvar.export.checkpoints.text_encoders import load_text_encoder
from fastvar.export.models.codebook.tokenizer import VqTokenizer
from fastvar.export.models.common.qwen2_encoder import qwen2_shapes
from fastvar.export.models.hart.reference import Draws, Prompt, Sampling, generate_scales
from fastvar.families.base import PromptFormat
from fastvar.families.hart import HART
from tests.conftest import TOKENIZER
from tests.models import tiny_hart as tiny
from tests.models.tiny_layouts import HART as HART_CONFIG

TEXT_LENGTH, UNKNOWN = 6, 2
CONFIG = HART_CONFIG
IMAGES = replace(tiny.TOKENIZER, max_scales=2)  # a pixel for each cell: the decoder is the slowest to trace
# As the published program writes it; what it leaves out the tensors tell.
SETTINGS = {"depth": 1, "embed_dim": 48, "num_heads": 3, "context_token": 6, "context_dim": 32, "patch_nums": [1, 2]}
SETTINGS |= {"attn_l2_norm": True, "disable_aln": True, "num_sampling_steps": "2", "mlp_ratio": 4.0}


def encoder_config():
    from transformers import Qwen2Config

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2Config(**sizes, **heads, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


def encoder_weights() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in RandomWeights(qwen2_shapes(encoder_config())).items()}


def write_encoder(folder: Path, weights: dict[str, Tensor], config: str, side: str = "right") -> None:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(config)
    (folder / "prefix.txt").write_text("a blue square")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<unk>"}, "padding_side": side}))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")


def image_tokenizer() -> VqTokenizer:
    torch.manual_seed(1)
    return VqTokenizer(IMAGES).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hart")
    derived = {"lvl_1L": torch.zeros(1, 10, dtype=torch.int64)}
    save_file(tiny.model(CONFIG).state_dict() | derived, made / "transformer.safetensors")
    save_file(image_tokenizer().state_dict(), made / "image_tokenizer.safetensors")
    (made / "config.json").write_text(json.dumps(SETTINGS))
    write_encoder(made / "text_encoder", encoder_weights(), encoder_config().to_json_string())
    return made


def test_what_a_folder_holds(folder: Path):
    checkpoint = load_checkpoint(folder)
    assert checkpoint.transformer == CONFIG
    assert checkpoint.image_tokenizer == IMAGES
    assert checkpoint.prompt_format == PromptFormat("a blue square", UNKNOWN, keeps_padding=True)
    assert checkpoint.prefix_length == 3
    assert "lvl_1L" not in checkpoint.transformer_weights


def test_another_prefix_is_another_checkpoint(folder: Path, tmp_path: Path):
    other = tmp_path / "text_encoder"
    shutil.copytree(folder / "text_encoder", other)
    (other / "prefix.txt").write_text("")
    found = load_checkpoint(folder, text_encoder=other)
    assert found.prefix_length == 0
    assert found.digest != load_checkpoint(folder).digest


def test_a_prompt_becomes_the_image_of_the_reference(folder: Path, engine_cache: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    fastvar.build(folder, size="32x32", policy="dense", guidance="on", out=out, cache=engine_cache)
    pipe = fastvar.Pipeline.load(out)
    assert pipe.manifest.prompt_format.prefix == "a blue square"
    image = np.asarray(pipe("a red circle", seed=7, guidance_scale=2.0).images[0])
    expected = (reference_image("a red circle", 7).permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(image - expected).max() < 1
    other = np.asarray(pipe("a blue square", seed=7, guidance_scale=2.0).images[0])
    assert np.abs(image.astype(int) - other).max() > 10


def reference_image(prompt: str, seed: int) -> Tensor:
    """[3, H, W], with the prompt's padding read, and everything before it read and cut off."""
    from transformers import Qwen2Model

    words = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    ids = [words[word] for word in ("a blue square " + prompt).split()] + [words["</s>"]]
    count = len(ids) - 3
    padding = TEXT_LENGTH - count
    encoder = Qwen2Model(encoder_config()).eval()
    encoder.load_state_dict(encoder_weights())
    mask = torch.tensor([[1] * len(ids) + [0] * padding])
    with torch.no_grad():
        features = encoder(torch.tensor([ids + [UNKNOWN] * padding]), attention_mask=mask).last_hidden_state
    counted = mask[:, 3:]
    text = Prompt(features[:, 3:], counted.bool(), counted.cumsum(1) - 1)

    def drawn(name: str):
        return lambda index, shape: torch.from_numpy(uniform_noise(seed, index, shape, name))

    draws = Draws(codes=lambda i, shape: drawn("noise")(i, (*shape[1:], 1)).view(shape))
    draws = replace(draws, diffusion=drawn("residual_noise"))
    plan, images = HART.plan(CONFIG.schedule, DENSE, CONFIG), image_tokenizer()
    *_, last = generate_scales(tiny.model(CONFIG), images, text, plan, draws, Sampling(2.0, smooth=False))
    return images.decode(last.summed)[0]


@pytest.mark.parametrize("layout", ["model.", "model.language_model."])
def test_the_language_half_of_qwen2_vl_is_read(tmp_path: Path, layout: str):
    config = {**json.loads(encoder_config().to_json_string()), "model_type": "qwen2_vl", "rope_theta": 1e6}
    config |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "vision_config": {"depth": 1}}
    weights = {layout + name: tensor for name, tensor in encoder_weights().items()}
    write_encoder(tmp_path / "vl", weights | {"visual.norm.weight": torch.ones(3)}, json.dumps(config), "left")
    found, tensors, _, prompt_format = load_text_encoder(tmp_path / "vl")
    assert found.model_type == "qwen2"
    assert found.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert prompt_format.pad_left
    assert {name: tensor.sum() for name, tensor in tensors.items()} == {
        name: tensor.sum() for name, tensor in encoder_weights().items()
    }


@pytest.mark.parametrize(
    "content", [None, "{}", '{"pad_token": "<none>"}', '{"pad_token": "<unk>", "padding_side": 1}']
)
def test_padding_must_be_known(folder: Path, tmp_path: Path, content: str | None):
    broken = tmp_path / "text_encoder"
    shutil.copytree(folder / "text_encoder", broken)
    path = broken / "tokenizer_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_text_encoder(broken)
