"""Names of files, as they are published: which belong to a model."""

import pytest

from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.published import published_files

T5 = tuple(f"flan-t5-xl/{name}" for name in ("config.json", "tokenizer.json", "model.safetensors"))
SHARDS_8B = tuple(f"infinity_8b_weights/pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))
INDEX_8B = "infinity_8b_weights/pytorch_model.bin.index.json"
INFINITY = (
    "README.md", "infinity_2b_reg.pth", INDEX_8B, *SHARDS_8B, "infinity_vae_d16.pth", "infinity_vae_d24.pth",
    "infinity_vae_d32.pth", "infinity_vae_d32_rdn_short.pth", "infinity_vae_d32reg.pth", "infinity_vae_d64.pth",
    "infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_512x512_weights/model.safetensors.index.json",
    "infinity_8b_512x512_weights/model-00001-of-00001.safetensors",
)  # fmt: skip
VAR = ("vae_ch160v4096z32.pth", *(f"var_d{depth}.pth" for depth in (16, 20, 24, 30, 36)))
HART = (
    "llm/config.json", "llm/model.safetensors", "llm/ema_model.bin", "tokenizer/config.json",
    "tokenizer/pytorch_model.bin",
)  # fmt: skip
QWEN2 = tuple(
    f"Qwen2-VL-1.5B-Instruct/{name}"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "prefix.txt", "model.safetensors")
)


def within(folder, names):
    return tuple(f"{folder}/{name}" for name in names)


def test_infinity_2b_among_all_that_is_published():
    found = published_files((*INFINITY, *T5), "infinity_2b")
    assert (found.model, found.family) == ("infinity_2b", "infinity")
    assert found.files == ("infinity_2b_reg.pth", "infinity_vae_d32reg.pth", *T5)
    assert found.text_encoder is not None
    assert found.text_encoder.path == "flan-t5-xl"


@pytest.mark.parametrize("name", ["infinity-2b", "Infinity_2B", "infinity_2b_reg", "infinity_2b_reg.pth"])
def test_a_model_goes_by_its_name_and_by_that_of_its_file(name):
    assert published_files(INFINITY, name).transformer.path == "infinity_2b_reg.pth"


def test_infinity_8b_takes_its_index_and_its_shards():
    found = published_files(INFINITY, "infinity_8b")
    assert found.transformer.path == INDEX_8B
    assert found.files == (INDEX_8B, *SHARDS_8B, "infinity_vae_d56_f8_14_patchify.pth")
    small = published_files(INFINITY, "infinity_8b_512x512")
    assert small.transformer.path == "infinity_8b_512x512_weights/model.safetensors.index.json"
    assert found.image_tokenizer == small.image_tokenizer


def test_the_text_encoder_may_be_published_elsewhere():
    found = published_files(INFINITY, "infinity_8b")
    assert found.text_encoder is None
    assert found.text_encoder_repository == "google/flan-t5-xl"
    assert found.text_encoders == ("text_encoder", "flan-t5-xl")


def test_infinity_125m():
    found = published_files(["infinity_125M_256x256.pth", "infinity_vae_d16.pth", "infinity_vae_d32reg.pth"])
    assert (found.model, found.files) == ("infinity_125m", ("infinity_125M_256x256.pth", "infinity_vae_d16.pth"))


def test_a_tokenizer_that_the_model_was_not_trained_with_is_not_taken():
    found = published_files(["infinity_2b_reg.pth", "infinity_vae_d32.pth", "infinity_vae_d16.pth"])
    assert found.image_tokenizer is None
    assert found.image_tokenizers[1:] == ("infinity_vae_d32reg", "infinity_vae_d32_reg")


def test_var_takes_the_depth_that_is_chosen():
    found = published_files(VAR, "var_d30")
    assert (found.model, found.files) == ("var_d30", ("var_d30.pth", "vae_ch160v4096z32.pth"))
    assert (found.text_encoders, found.text_encoder_repository) == ((), "")


def test_hart_takes_the_average_that_its_program_draws_with():
    found = published_files((*HART, *QWEN2))
    assert (found.model, found.family) == ("hart_0.7b", "hart")
    assert found.transformer == type(found.transformer)("llm/ema_model.bin", ("llm/ema_model.bin", "llm/config.json"))
    assert found.image_tokenizer is not None
    assert found.image_tokenizer.files == ("tokenizer/pytorch_model.bin", "tokenizer/config.json")
    assert found.text_encoder is not None
    assert set(found.text_encoder.files) == set(QWEN2)
    without = published_files([name for name in HART if "ema" not in name])
    assert without.transformer.path == "llm/model.safetensors"


def test_a_repository_beside_that_of_its_text_encoder():
    found = published_files((*within("hart-0.7b-1024px", HART), *QWEN2))
    assert found.transformer.path == "hart-0.7b-1024px/llm/ema_model.bin"
    assert found.image_tokenizer is not None
    assert found.image_tokenizer.path == "hart-0.7b-1024px/tokenizer/pytorch_model.bin"
    assert found.text_encoder is not None
    assert found.text_encoder.path == "Qwen2-VL-1.5B-Instruct"


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (VAR, "var_d16 (var_d16.pth), var_d20 (var_d20.pth)"),
        (INFINITY, "infinity_2b (infinity_2b_reg.pth), infinity_8b (infinity_8b_weights)"),
        (["a.pth", "b.safetensors"], "a.pth, b.safetensors"),
        (["transformer.pth", "var_d16.pth"], "transformer.pth, var_d16 (var_d16.pth)"),
    ],
)
def test_several_models_are_named(names, shown):
    with pytest.raises(CheckpointError, match="could be the transformer") as caught:
        published_files(names)
    assert shown in str(caught.value)
    assert "--model" in str(caught.value)


def test_a_name_that_no_model_has():
    with pytest.raises(CheckpointError, match="no model 'var_d99'") as caught:
        published_files(VAR, "var_d99")
    assert "var_d36" in str(caught.value)


def test_nothing_that_could_be_a_model():
    with pytest.raises(CheckpointError, match="0 files that could be the transformer"):
        published_files(["README.md", "infinity_vae_d32reg.pth", "flan-t5-xl/model.safetensors"])


def test_our_own_names_with_their_shards_and_what_lies_beside():
    names = ("transformer.safetensors.index.json", "transformer-00001-of-00001.safetensors", "config.json")
    found = published_files((*names, "image_tokenizer.pth", "text_encoder/model.safetensors", "notes/extra.pth"))
    assert set(found.transformer.files) == set(names)
    assert (found.family, found.image_tokenizer and found.image_tokenizer.path) == (None, "image_tokenizer.pth")
    assert found.text_encoder is not None
    assert found.text_encoder.path == "text_encoder"


def test_of_one_name_safetensors_come_first():
    assert published_files(["transformer.pth", "transformer.safetensors"]).transformer.path == "transformer.safetensors"
    found = published_files(["infinity_2b_reg.pth", "infinity_2b_reg.safetensors"])
    assert found.transformer.files == ("infinity_2b_reg.safetensors",)


def test_a_transformer_of_its_own_name_takes_the_only_tokenizer_there_is():
    found = published_files(["finetune.pth", "infinity_vae_d24.pth", "flan-t5-xl/config.json"])
    assert found.image_tokenizer is not None
    assert found.files == ("finetune.pth", "infinity_vae_d24.pth", "flan-t5-xl/config.json")
    two = published_files(["finetune.pth", "infinity_vae_d24.pth", "infinity_vae_d32reg.pth"])
    assert two.image_tokenizer is None
    assert two.rivals == ("infinity_vae_d32reg.pth", "infinity_vae_d24.pth")
    ours = published_files(["finetune.pth", "infinity_vae_d24.pth", "image_tokenizer.pth"])
    assert ours.image_tokenizer is not None
    assert ours.image_tokenizer.path == "image_tokenizer.pth"


def test_what_lies_deeper_is_no_rival():
    found = published_files(["transformer.pth", "image_tokenizer.pth", *within("old", ("infinity_2b_reg.pth",))])
    assert found.transformer.path == "transformer.pth"
