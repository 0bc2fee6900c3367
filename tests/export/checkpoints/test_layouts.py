"""Folders as they are published, loaded without renaming anything."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastvar
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.checkpoint import load_checkpoint
from tests.export.checkpoints.test_checkpoint import _equal
from tests.models import tiny_layouts as tiny


def test_infinity_2b(tmp_path):
    found = load_checkpoint(tiny.infinity_2b(tmp_path / "Infinity"))
    assert (found.name, found.transformer, found.image_tokenizer) == ("infinity_2b", tiny.INFINITY_2B, tiny.IMAGES_16)
    _equal(found.transformer_weights, tiny.transformer(tiny.INFINITY_2B))
    assert found.text_encoder is not None
    assert found.origin == (
        "transformer: infinity_2b_reg.pth",
        "image tokenizer: infinity_vae_d32reg.pth (vae)",
        "text encoder: flan-t5-xl",
    )


def test_the_parts_may_be_named_besides(tmp_path):
    folder = tiny.infinity_2b(tmp_path / "Infinity")
    whole = load_checkpoint(folder).digest
    paths = {"image_tokenizer": folder / "infinity_vae_d32reg.pth", "text_encoder": folder / "flan-t5-xl"}
    assert load_checkpoint(folder, **paths).digest == whole
    assert load_checkpoint(folder / "infinity_2b_reg.pth").digest == whole


@pytest.mark.parametrize("pickled", [True, False], ids=["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("inside", ["", "infinity_8b_weights"])
def test_infinity_8b_in_shards(tmp_path, pickled, inside):
    """The folder, or that of the weights within it."""
    found = load_checkpoint(tiny.infinity_8b(tmp_path / "Infinity", pickled) / inside)
    assert (found.name, found.transformer, found.image_tokenizer) == ("infinity_8b", tiny.INFINITY_8B, tiny.IMAGES_8)
    _equal(found.transformer_weights, tiny.transformer(tiny.INFINITY_8B))


def test_the_index_of_the_shards_may_be_named(tmp_path):
    folder = tiny.infinity_8b(tmp_path / "Infinity")
    index = folder / "infinity_8b_weights" / "pytorch_model.bin.index.json"
    assert load_checkpoint(index).digest == load_checkpoint(folder).digest


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = tiny.infinity_8b(tmp_path / "Infinity")
    (folder / "infinity_8b_weights" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin does not exist"):
        load_checkpoint(folder)


def test_infinity_125m(tmp_path):
    found = load_checkpoint(tiny.infinity_125m(tmp_path / "Infinity"))
    assert (found.name, found.transformer) == ("infinity_125m", tiny.INFINITY_2B)


def test_two_models_and_the_tokenizer_of_each(tmp_path):
    folder = tiny.infinity_8b(tiny.infinity_2b(tmp_path / "Infinity"), text_encoder=False)
    torch.save({}, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match="could be the transformer") as caught:
        load_checkpoint(folder)
    assert "infinity_2b (infinity_2b_reg.pth), infinity_8b (infinity_8b_weights)" in str(caught.value)
    for name, config, images in (
        ("infinity_2b", tiny.INFINITY_2B, tiny.IMAGES_16),
        ("infinity_8b", tiny.INFINITY_8B, tiny.IMAGES_8),
    ):
        found = load_checkpoint(folder, model=name)
        assert (found.name, found.transformer, found.image_tokenizer) == (name, config, images)


def test_var_of_several_depths(tmp_path):
    folder = tiny.var(tmp_path / "var", depths=(16, 30))
    with pytest.raises(CheckpointError, match=r"var_d16 \(var_d16\.pth\), var_d30 \(var_d30\.pth\)"):
        load_checkpoint(folder)
    for seed, name in enumerate(("var_d16", "var_d30")):
        found = load_checkpoint(folder, model=name)
        assert (found.name, found.image_tokenizer) == (name, tiny.VQ)
        _equal(found.transformer_weights, tiny.transformer(tiny.VAR, seed))


@pytest.mark.parametrize("inside", ["", "llm"])
def test_hart_draws_with_its_average(tmp_path, inside):
    folder = tiny.hart(tmp_path / "hart-0.7b-1024px")
    tiny.write_qwen2(folder / "Qwen2-VL-1.5B-Instruct")
    found = load_checkpoint(folder / inside)
    assert (found.name, found.transformer, found.image_tokenizer) == ("hart_0.7b", tiny.HART, tiny.HART_IMAGES)
    _equal(found.transformer_weights, tiny.transformer(tiny.HART, 2))
    assert found.prompt_format.prefix == "a blue square"
    assert found.origin[:2] == ("transformer: llm/ema_model.bin", "image tokenizer: tokenizer/model.safetensors")


def test_hart_without_an_average_and_beside_its_text_model(tmp_path):
    tiny.hart(tmp_path / "hart-0.7b-1024px", averaged=False)
    tiny.write_qwen2(tmp_path / "Qwen2-VL-1.5B-Instruct")
    found = load_checkpoint(tmp_path)
    _equal(found.transformer_weights, tiny.transformer(tiny.HART, 1))
    assert found.origin[0] == "transformer: hart-0.7b-1024px/llm/model.safetensors"


def test_hart_with_its_parts_named(tmp_path):
    folder = tiny.hart(tmp_path / "hart")
    tiny.write_qwen2(tmp_path / "text")
    moved = shutil.move(folder / "tokenizer", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no image tokenizer in"):
        load_checkpoint(folder, text_encoder=tmp_path / "text")
    found = load_checkpoint(folder, text_encoder=tmp_path / "text", image_tokenizer=Path(moved))
    assert found.image_tokenizer == tiny.HART_IMAGES
    with pytest.raises(CheckpointError, match=r"no text encoder in .*\nexpected: text_encoder or Qwen2-VL-1\.5B"):
        load_checkpoint(folder, image_tokenizer=Path(moved))


def test_several_tokenizers_for_a_transformer_of_its_own_name_are_named(tmp_path):
    folder = tiny.infinity_2b(tmp_path / "mine")
    (folder / "infinity_2b_reg.pth").rename(folder / "finetune.pth")
    assert load_checkpoint(folder).name == "mine"
    shutil.copy(folder / "infinity_vae_d32reg.pth", folder / "infinity_vae_d32.pth")
    with pytest.raises(CheckpointError, match=r"2 files that could be the image tokenizer: .*d32reg\.pth, .*d32\.pth"):
        load_checkpoint(folder)


def test_the_tokenizer_of_another_model_is_not_taken(tmp_path):
    folder = tiny.infinity_2b(tmp_path / "Infinity")
    (folder / "infinity_vae_d32reg.pth").rename(folder / "infinity_vae_d32.pth")
    with pytest.raises(CheckpointError, match=r"no image tokenizer in .*\nexpected: image_tokenizer or .*d32reg"):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_throughout(tmp_path, dtype):
    """Every matrix of transformer and image tokenizer in 8 bits with its scale, as quantising tools leave them."""
    folder = tiny.infinity_2b(tmp_path / "Infinity")
    true = load_checkpoint(folder)
    for weights, file in (
        (true.transformer_weights, "infinity_2b_reg"),
        (true.image_tokenizer_weights, "infinity_vae_d32reg"),
    ):
        stored = {}
        for name, tensor in weights.items():
            if name.endswith("weight") and tensor.dim() > 1:
                scale = tensor.float().abs().max() / torch.finfo(dtype).max
                stored |= {name: (tensor.float() / scale).to(dtype), f"{name}_scale": scale.reshape(1)}
            else:
                stored[name] = tensor
        assert any(name.endswith("_scale") for name in stored)
        (folder / f"{file}.pth").unlink()
        save_file(stored, folder / f"{file}.safetensors")
    found = load_checkpoint(folder)
    for read, expected in (
        (found.transformer_weights, true.transformer_weights),
        (found.image_tokenizer_weights, true.image_tokenizer_weights),
    ):
        for name, tensor in expected.items():
            assert (read[name].float() - tensor.float()).norm() <= 0.15 * tensor.float().norm(), name


@pytest.mark.parametrize("model", ["var_d16", "VAR-d30.pth"])
def test_a_build_chooses_and_says_what_it_found(run, engine_cache, tmp_path, model):
    tiny.var(tmp_path / "var", depths=(16, 30))
    options = ("--policy", "dense", "--guidance", "off", "--cache", engine_cache, "--model", model)
    code, out, err = run("build", "var", *options, "--out", "b")
    assert (code, err) == (0, "")
    name = model.lower().replace("-", "_").removesuffix(".pth")
    assert f"transformer: {name}.pth" in out
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.model == name
    assert manifest.origin == (f"transformer: {name}.pth", "image tokenizer: vae_ch160v4096z32.pth")


def test_a_plan_chooses_too(run, tmp_path):
    folder = tiny.var(tmp_path / "var", depths=(16, 30))
    code, out, _ = run("plan", folder, "--model", "var_d30", "--policy", "dense")
    assert code == 0
    assert "var_d30" in out
    assert run("plan", folder)[0] == 2


def test_a_build_of_several_models_names_them(run, tmp_path):
    folder = tiny.var(tmp_path / "var", depths=(16, 30))
    code, _, err = run("build", folder, "--out", "b")
    assert code == 2
    assert "var_d16 (var_d16.pth), var_d30 (var_d30.pth)" in err
    assert "--model" in err
    with pytest.raises(CheckpointError, match="no model 'var_d99'"):
        fastvar.build(folder, out=tmp_path / "b", model="var_d99")
    code, _, err = run("build", "--random-weights", "var_d16", "--model", "var_d16", "--out", "b")
    assert code == 2
    assert "--model goes with a CHECKPOINT" in err
