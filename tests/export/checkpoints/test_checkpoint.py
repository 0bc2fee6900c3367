import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from fastvar.errors import CheckpointError, NumericsError
from fastvar.export.checkpoints.checkpoint import (
    image_tokenizer_shapes,
    load_checkpoint,
    load_image_tokenizer,
    load_text_encoder,
    load_transformer,
    transformer_shapes,
)
from fastvar.export.checkpoints.random_weights import RandomWeights
from fastvar.export.models.infinity.model import infer_transformer
from fastvar.export.models.infinity.tokenizer import infer_image_tokenizer
from fastvar.export.models.registry import ADAPTERS
from fastvar.families.base import PromptFormat, to_json
from fastvar.families.infinity import TRANSFORMERS, ImageTokenizerConfig, TransformerConfig, image_tokenizer_for
from fastvar.families.var import SCALES_256, VarConfig

INFINITY = ADAPTERS["infinity"]
GOLDEN = Path(__file__).parents[2] / "golden"
MODEL = TransformerConfig(
    depth=4, width=64, heads=4, mlp_width=256, text_width=128, text_length=8, code_channels=16, chunks=2, max_scales=11
)
IMAGES = ImageTokenizerConfig(bits=16, base_channels=48, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=0)
TEXT = T5Config(vocab_size=20, d_model=128, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")


def _published(name):
    keys = json.loads(gzip.decompress((GOLDEN / f"{name}_keys.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in keys.items()}


def _state(config=MODEL):
    return dict(RandomWeights(transformer_shapes(config)))


def _image_state(config=IMAGES):
    return dict(RandomWeights(image_tokenizer_shapes(config, INFINITY)))


def _equal(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "text_encoder"
    torch.manual_seed(0)
    T5EncoderModel(TEXT).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}')
    return folder


@pytest.fixture
def text_encoder_copy(text_encoder, tmp_path):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    for file in text_encoder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def folder(tmp_path, text_encoder_copy):
    torch.save(_state(), tmp_path / "transformer.pth")
    torch.save({"vae": _image_state()}, tmp_path / "image_tokenizer.pth")
    return tmp_path


# The published models


@pytest.mark.parametrize("name", ["infinity_2b", "infinity_8b"])
def test_published_transformers_have_our_tensors_and_are_recognised(name):
    published = _published(name)
    assert transformer_shapes(TRANSFORMERS[name]) == published
    assert infer_transformer(published) == TRANSFORMERS[name]


def test_published_image_tokenizer_has_our_tensors_and_is_recognised():
    published = _published("infinity_vae_d32")
    masks = {"quantizer.lfq.mask", "quantize.lfq.mask"}
    config = image_tokenizer_for(TRANSFORMERS["infinity_2b"])
    assert masks < set(published)
    assert image_tokenizer_shapes(config, INFINITY) == {k: v for k, v in published.items() if k not in masks}
    assert infer_image_tokenizer(published) == config


# Transformers


@pytest.mark.parametrize(
    "config",
    [MODEL, replace(MODEL, chunks=1), replace(MODEL, chunks=4), replace(MODEL, depth=12, chunks=1, heads=2)],
    ids=["2 chunks", "1 chunk", "chunks of one", "more than ten layers"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_configuration_is_inferred_whatever_the_layout(tmp_path, config, suffix):
    state, file = _state(config), tmp_path / f"model{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    found, weights = load_transformer(file)
    assert found == config
    _equal(weights, state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"trainer": s},
        lambda s: {"trainer": {"gpt_fsdp": s, "gpt_fsdp_opt": {"state": {}}}, "iter": 7},
        lambda s: {"trainer": {"gpt_wo_ddp": s}},
    ],
)
def test_training_checkpoints(tmp_path, wrap):
    torch.save(wrap(_state()), tmp_path / "w.pth")
    config, weights = load_transformer(tmp_path / "w.pth")
    assert config == MODEL
    _equal(weights, _state())


def test_spatial_patchify_is_known_by_its_56_channels_or_by_configuration(tmp_path):
    assert infer_transformer(transformer_shapes(replace(MODEL, code_channels=56, spatial_patchify=True))).bits == 14
    patchified = replace(MODEL, spatial_patchify=True)
    torch.save(_state(patchified), tmp_path / "w.pth")
    assert load_transformer(tmp_path / "w.pth")[0].bits == 16
    assert load_transformer(tmp_path / "w.pth", patchified)[0].bits == 4


def test_key_biases_may_be_missing(tmp_path):
    state = {name: tensor for name, tensor in _state().items() if not name.endswith("zero_k_bias")}
    torch.save(state, tmp_path / "w.pth")
    _, weights = load_transformer(tmp_path / "w.pth")
    assert set(weights) == set(transformer_shapes(MODEL))
    assert not weights["block_chunks.0.module.0.sa.zero_k_bias"].any()


@pytest.mark.parametrize("own", [True, False], ids=["our field names", "the published ones"])
def test_a_folder_with_its_configuration(tmp_path, own):
    config = replace(MODEL, spatial_patchify=True, max_scales=15)
    published = {"depth": 4, "embed_dim": 64, "num_heads": 4, "text_channels": 128, "text_maxlen": 8, "d_vae": 16}
    published |= {"block_chunks": 2, "apply_spatial_patchify": 1}
    (tmp_path / "config.json").write_text(json.dumps(to_json(config) if own else published))
    save_file(_state(config), tmp_path / "transformer.safetensors")
    assert load_transformer(tmp_path)[0] == config


@pytest.mark.parametrize("named", [True, False], ids=["beside a named file", "in the folder"])
@pytest.mark.parametrize("name", ["heads", "scales"])
def test_a_part_of_a_configuration_completes_what_the_tensors_say(tmp_path, named, name):
    config = VarConfig(2, 48, 4, 32, 3, 12, 4, scales=(1, 2, 3))
    config = replace(config, unit_queries=name == "scales", scales=(1, 2, 3) if name == "scales" else SCALES_256)
    save_file(dict(RandomWeights(transformer_shapes(config))), tmp_path / "transformer.safetensors")
    path = tmp_path / "transformer.safetensors" if named else tmp_path
    with pytest.raises(CheckpointError, match=f'"{name}"'):
        load_transformer(path)
    (tmp_path / "config.json").write_text(json.dumps({name: to_json(config)[name]}))
    assert load_transformer(path)[0] == config
    for wrong in ({**to_json(config), "depth": 3}, {"head": 4}, {name: "4"}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="configuration"):
            load_transformer(path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "1" * 5000, '{"depth": NaN}', "[1]", "", "\xff", '{"a": "\\ud800"}']
)
def test_a_configuration_that_is_none(tmp_path, content):
    torch.save(_state(), tmp_path / "w.pth")
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError):
        load_transformer(tmp_path / "w.pth")


@pytest.mark.parametrize("number", ["7", "99999999", "9" * 5000])
def test_layers_with_a_gap_are_not_taken_for_so_many_layers(tmp_path, number):
    state = _state(replace(MODEL, chunks=1))
    state[f"blocks.{number}.ffn.fc1.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"no tensor blocks\.4\.|not part of the model"):
        load_transformer(tmp_path / "w.pth")


def test_a_folder_with_one_unnamed_file_or_with_shards(tmp_path):
    state = _state()
    torch.save(state, tmp_path / "infinity.pth")
    torch.save(_image_state(), tmp_path / "image_tokenizer.pth")
    _equal(load_transformer(tmp_path)[1], state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"2 files that could be the transformer: infinity\.pth, other\.pth"):
        load_transformer(tmp_path)
    names = sorted(state)
    shards = {name: f"m-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(shards.values()):
        save_file({name: state[name] for name in names if shards[name] == file}, tmp_path / file)
    (tmp_path / "model.index.json").write_text(json.dumps({"weight_map": shards}))
    _equal(load_transformer(tmp_path)[1], state)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="0 files that could be the transformer"):
        load_transformer(tmp_path)


def test_another_model(tmp_path):
    torch.save({"embed.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"not a transformer of a family that fastvar knows\nexpected: cfg_uncond \(infinity\)"
    ):
        load_transformer(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="not an image tokenizer"):
        load_image_tokenizer(tmp_path / "w.pth", INFINITY)


def test_a_configuration_that_is_not_that_of_the_file(tmp_path):
    torch.save(_state(), tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"tensors of another shape: .*cfg_uncond \[8, 128\] instead of \[9, 128\]"
    ):
        load_transformer(tmp_path / "w.pth", replace(MODEL, text_length=9))


def test_a_layer_without_one_of_its_tensors(tmp_path):
    state = _state()
    del state["block_chunks.1.module.0.ca.proj.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors missing: block_chunks\.1\.module\.0\.ca\.proj\.bias"):
        load_transformer(tmp_path / "w.pth")


def test_weights_that_are_not_finite(tmp_path):
    state = _state()
    state["head.weight"][3, 3] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(NumericsError, match=r"head\.weight"):
        load_transformer(tmp_path / "w.pth")


# Image tokenizers


@pytest.mark.parametrize(
    "config", [IMAGES, ImageTokenizerConfig(6, 24, (1, 2, 4), 1), ImageTokenizerConfig(4, 32, (1, 1), 3)]
)
def test_image_tokenizer_is_inferred(tmp_path, config):
    state = _image_state(config)
    torch.save(state, tmp_path / "plain.pth")
    extras = {"quantizer.lfq.mask": torch.ones(16, dtype=torch.int64), "quantize.lfq.mask": torch.ones(1).long()}
    extras |= {"image_disc.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(1)}
    torch.save({"vae": {**state, **extras}, "optimizer": {"x": 1}}, tmp_path / "nested.pth")
    for name in ("plain.pth", "nested.pth"):
        found, weights = load_image_tokenizer(tmp_path / name, INFINITY)
        assert found == config
        _equal(weights, state)


def test_a_quantiser_we_do_not_know_is_not_ignored(tmp_path):
    torch.save({**_image_state(), "post_quant_conv.weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"not part of the model: post_quant_conv\.weight"):
        load_image_tokenizer(tmp_path / "w.pth", INFINITY)


# Text encoders


def test_text_encoder(text_encoder):
    config, weights, tokenizer_file, prompt_format = load_text_encoder(text_encoder)
    assert prompt_format == PromptFormat()
    assert (config.d_model, config.num_layers) == (128, 1)
    assert tokenizer_file == text_encoder / "tokenizer.json"
    stored = load_file(text_encoder / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())


def test_text_encoder_folder_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no text encoder folder"):
        load_text_encoder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_text_encoder_lacks_a_file(text_encoder_copy, name):
    (text_encoder_copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        load_text_encoder(text_encoder_copy)


def test_text_encoder_without_weights_or_with_damaged_ones(text_encoder_copy):
    weights = text_encoder_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_text_encoder(text_encoder_copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_text_encoder(text_encoder_copy)


def test_text_encoder_tensors_are_never_made_up(text_encoder_copy):
    file = text_encoder_copy / "model.safetensors"
    state = load_file(file)
    lost = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file({k: v.clone() for k, v in state.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors: {lost}"):
        load_text_encoder(text_encoder_copy)


def test_text_encoder_of_another_family(text_encoder_copy):
    (text_encoder_copy / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="of type 'clip'"):
        load_text_encoder(text_encoder_copy)


# The whole


def test_a_whole_folder(folder):
    found = load_checkpoint(folder, name="tiny")
    assert (found.name, found.transformer, found.image_tokenizer) == ("tiny", MODEL, IMAGES)
    assert found.text_encoder.d_model == 128
    assert found.tokenizer_file == folder / "text_encoder/tokenizer.json"
    _equal(found.transformer_weights, _state())
    _equal(found.image_tokenizer_weights, _image_state())


def test_a_file_alone_needs_the_two_other_paths(folder):
    whole = load_checkpoint(folder)
    file = folder / "alone" / "transformer.pth"
    file.parent.mkdir()
    (folder / "transformer.pth").rename(file)
    with pytest.raises(CheckpointError, match=r"no image tokenizer in .*alone\n.*\n.*--image-tokenizer"):
        load_checkpoint(file)
    with pytest.raises(CheckpointError, match="no text encoder in"):
        load_checkpoint(file, image_tokenizer=folder / "image_tokenizer.pth")
    paths = {"image_tokenizer": folder / "image_tokenizer.pth", "text_encoder": folder / "text_encoder"}
    found = load_checkpoint(file, **paths)
    assert found.name == "transformer"
    assert found.digest == whole.digest


def test_a_file_beside_the_other_parts_needs_no_paths(folder):
    found = load_checkpoint(folder / "transformer.pth")
    assert (found.name, found.digest) == ("transformer", load_checkpoint(folder).digest)
    with pytest.raises(CheckpointError, match="no folder of which a model 'transformer' could be chosen"):
        load_checkpoint(folder / "transformer.pth", model="transformer")


@pytest.mark.parametrize("part", ["transformer.pth", "image_tokenizer.pth", "text_encoder/tokenizer.json"])
def test_the_digest_covers_every_part(folder, part):
    before = load_checkpoint(folder).digest
    assert before == load_checkpoint(folder).digest
    file = folder / part
    if file.suffix == ".json":
        file.write_text('{"model": {"type": "BPE"}}')
    else:
        content = torch.load(file)
        next(iter(content.get("vae", content).values())).view(-1)[0] += 1
        torch.save(content, file)
    assert load_checkpoint(folder).digest != before


@pytest.mark.parametrize("part", ["image_tokenizer.pth", "transformer.pth"])
def test_a_folder_without_a_part(folder, part):
    (folder / part).unlink()
    with pytest.raises(CheckpointError, match=part.split(".")[0].replace("_", " ")):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (replace(IMAGES, bits=8), "predicts 16 bits a cell, the image tokenizer reads 8"),
        (replace(IMAGES, channel_multipliers=(1, 1, 1, 1)), "8 pixels a side"),
    ],
)
def test_parts_that_were_not_trained_together(folder, images, complaint):
    torch.save(_image_state(images), folder / "image_tokenizer.pth")
    with pytest.raises(CheckpointError, match=complaint):
        load_checkpoint(folder)


def test_a_text_encoder_of_another_width(folder):
    torch.save(_state(replace(MODEL, text_width=256)), folder / "transformer.pth")
    with pytest.raises(CheckpointError, match="width 256, the text encoder gives 128"):
        load_checkpoint(folder)
