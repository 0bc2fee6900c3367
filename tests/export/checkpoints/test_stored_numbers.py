"""Tensors in 8 bits: multiplied out where one scale says how, refused elsewhere, never taken as they are."""

import pytest
import torch
from safetensors.torch import save_file

from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.checkpoint import load_image_tokenizer, load_transformer
from fastvar.export.checkpoints.stored_numbers import plain_numbers
from fastvar.export.models.registry import ADAPTERS
from tests.export.checkpoints.test_checkpoint import IMAGES, MODEL, _image_state, _state

TRUE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def quantised(values: torch.Tensor, dtype: torch.dtype, per_row: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    largest = values.abs().amax(1, keepdim=True) if per_row else values.abs().amax()
    limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = largest / limit
    scaled = values / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.int8], ids=str)
@pytest.mark.parametrize("scale_name", ["a.weight_scale", "a.scale_weight", "a.weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6, 1), (6,)], ids=str)
def test_a_value_times_its_scale(dtype, scale_name, shape):
    values, scale = quantised(TRUE, dtype, per_row=6 in shape)
    other = torch.ones(3, dtype=torch.float16)
    found = plain_numbers({"a.weight": values, scale_name: scale.reshape(shape), "b": other})
    assert set(found) == {"a.weight", "b"}
    assert torch.equal(found["a.weight"], values.float() * scale)
    assert (found["a.weight"] - TRUE).norm() < 0.1 * TRUE.norm()
    assert found["b"] is other


def test_scales_of_inputs_go_with_the_scales_of_weights():
    """Products here take inputs as they come."""
    values, scale = quantised(TRUE, FLOAT8[0])
    extras = {"a.scale_input": torch.ones(()), "a.input_scale": torch.ones(()), "scaled_fp8": torch.zeros(2)}
    extras["scaled_fp8"] = extras["scaled_fp8"].to(FLOAT8[0])
    assert set(plain_numbers({"a.weight": values, "a.scale_weight": scale, **extras})) == {"a.weight"}
    with pytest.raises(CheckpointError, match=r"not understood: a\.scale_input"):
        plain_numbers({"a.weight": TRUE, "a.scale_input": torch.ones(())})


@pytest.mark.parametrize("shape", [(300, 130), (128, 256), (100, 100), (256, 3)], ids=str)
def test_fine_grained_float8_has_a_scale_for_each_block(shape):
    true = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows, columns = (-(-size // 128) for size in shape)
    scale = torch.rand(rows, columns) + 0.5
    expanded = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    values = (true / expanded).to(FLOAT8[0])
    found = plain_numbers({"a.weight": values, "a.weight_scale_inv": scale})["a.weight"]
    assert torch.equal(found, values.float() * expanded)
    assert (found - true).norm() < 0.1 * true.norm()


def test_products_are_made_when_they_are_asked_for():
    values, scale = quantised(TRUE, FLOAT8[0])
    found = plain_numbers({"a.weight": values, "a.weight_scale": scale, "b": TRUE})
    assert found["a.weight"] is not found["a.weight"]
    assert (found.stored["a.weight"].shape, found.stored["a.weight"].dtype) == (TRUE.shape, torch.float32)
    assert found.stored["b"] is found["b"] is TRUE
    assert list(found.only(["b"])) == ["b"]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_without_a_scale_is_refused(dtype):
    with pytest.raises(CheckpointError, match=r"stored in 8 bits without a scale: a\.weight torch\.float8"):
        plain_numbers({"a.weight": TRUE.to(dtype), "b.weight": TRUE})


F8, I8 = TRUE.to(FLOAT8[0]), TRUE.to(torch.int8)
ONE = torch.ones(())
OTHERS = {
    "a scale of plain numbers": {"a.weight": TRUE, "a.weight_scale": ONE},
    "two scales": {"a.weight": F8, "a.weight_scale": ONE, "a.scale_weight": ONE},
    "a scale in whole numbers": {"a.weight": F8, "a.weight_scale": torch.ones((), dtype=torch.int32)},
    "exponents for scales": {"a.weight": F8, "a.weight_scale": torch.ones(6, 1, dtype=torch.uint8)},
    "unsigned values": {"a.weight": TRUE.to(torch.uint8), "a.weight_scale": ONE},
    "an inverse scale besides": {"a.weight": F8, "a.weight_scale": ONE, "a.weight_scale_inv": ONE},
    "other blocks": {"a.weight": F8, "a.weight_scale_inv": torch.ones(3, 2)},
    "blocks": {"a.weight": F8, "a.weight_scale": torch.ones(3, 2)},
    "columns": {"a.weight": F8, "a.weight_scale": torch.ones(1, 4)},
    "rows or columns": {"a.weight": TRUE[:4].to(FLOAT8[0]), "a.weight_scale": torch.ones(4)},
    "a zero point": {"a.weight": I8, "a.weight_scale": ONE, "a.weight_zero_point": ONE},
    "bitsandbytes 8 bits": {
        "a.weight": I8,
        "a.SCB": torch.ones(6),
        "a.weight_format": torch.zeros((), dtype=torch.uint8),
    },
    "bitsandbytes 4 bits": {"a.weight": TRUE.to(torch.uint8), "a.weight.absmax": ONE, "a.weight.quant_map": ONE},
    "its states": {"a.weight": TRUE, "a.weight.quant_state.bitsandbytes__nf4": ONE},
    "GPTQ": {"a.qweight": I8.int(), "a.qzeros": I8.int(), "a.scales": ONE, "a.g_idx": I8.int()},
    "packed": {"a.weight_packed": I8.int(), "a.weight_scale": ONE, "a.weight_shape": ONE},
    "quanto": {"a.weight._data": I8, "a.weight._scale": ONE},
    "a flag alone": {"a.weight": TRUE, "scaled_fp8": F8},
}


@pytest.mark.parametrize("state", OTHERS.values(), ids=OTHERS)
def test_other_conventions_are_refused(state):
    with pytest.raises(CheckpointError, match=r"f\.safetensors holds tensors .*a\.|scaled_fp8"):
        plain_numbers(state, "f.safetensors")


def test_names_of_plain_models_are_no_marks():
    plain = {name: torch.ones(1) for name in ("blocks.0.sa.scale_mul_1H11", "norm.scale", "proj.bias", "lvl_1L")}
    assert plain_numbers(plain) == plain
    for state in (_state(), _image_state()):
        assert set(plain_numbers(state)) == set(state)


def load(part, path):
    return load_transformer(path) if part == "transformer" else load_image_tokenizer(path, ADAPTERS["infinity"])


PARTS = {
    "transformer": (_state(MODEL), "block_chunks.0.module.0.ffn.fc1.weight"),
    "image_tokenizer": (_image_state(IMAGES), "decoder.conv_in.conv.weight"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_every_part_is_multiplied_out(tmp_path, part, suffix):
    state, name = PARTS[part]
    values, scale = quantised(state[name].float(), FLOAT8[0])
    stored = {**state, name: values, name.removesuffix("weight") + "scale_weight": scale}
    path = tmp_path / f"w{suffix}"
    save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    _, weights = load(part, path)
    assert torch.equal(weights[name], values.float() * scale)
    assert set(weights) == set(state)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64, torch.complex64, torch.float64, torch.bool],
    ids=str,
)
def test_no_part_takes_other_types_for_plain_numbers(tmp_path, part, dtype):
    state, name = PARTS[part]
    torch.save({**state, name: state[name].to(dtype)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"without a scale|of another type"):
        load(part, tmp_path / "w.pth")
