"""Files with bytes behind their tensors are read like those without; what is damaged is refused as ever."""

import json
import logging

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.checkpoint import load_transformer
from fastvar.export.checkpoints.tensor_files import read_tensors
from tests.export.checkpoints.test_checkpoint import MODEL, _equal, _state

STATE = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.zeros(1).half(),
    "d": torch.arange(3).to(torch.int8),
    "e": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "f": torch.zeros(()),
}


def test_bytes_behind_the_last_tensor_are_not_read(tmp_path, caplog):
    file = tmp_path / "w.safetensors"
    for count in (1, 16, 5000):
        save_file(STATE, file)
        file.write_bytes(file.read_bytes() + b"\xff" * count)
        with pytest.raises(SafetensorError):
            load_file(file)
        with caplog.at_level(logging.WARNING):
            found = read_tensors(file)
        assert f"{count} bytes behind its last tensor" in caplog.messages[-1]
        for name, tensor in STATE.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].float(), tensor.float())


def test_such_a_file_is_mapped(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes() + bytes(64))
    a, b = (read_tensors(file)[name] for name in "ab")
    found = read_tensors(file)
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()
    a += 1  # of this process alone
    assert torch.equal(read_tensors(file)["a"], torch.zeros(1000))
    assert torch.equal(b, torch.ones(1000))


def test_a_transformer_with_padding(tmp_path):
    save_file(_state(), tmp_path / "w.safetensors")
    with (tmp_path / "w.safetensors").open("ab") as file:
        file.write(bytes(16))
    config, weights = load_transformer(tmp_path / "w.safetensors")
    assert config == MODEL
    _equal(weights, _state())


def written(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(start, stop, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


DAMAGED = {
    "a gap": {"a": entry(0, 4), "b": entry(8, 12)},
    "a gap at the start": {"a": entry(4, 8)},
    "an overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "a shape of another size": {"a": entry(0, 8, [3])},
    "a negative size": {"a": entry(0, 4, [-1, -1])},
    "a broken number": {"a": entry(0, 4, [1.0])},
    "an unknown type": {"a": entry(0, 4, dtype="F7")},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "cut short": {"a": entry(0, 4000)},
    "one name twice": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "no tensors": {},
    "a list": b"[1, 2]",
    "nothing": b"",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_still_found(tmp_path, damage):
    written(tmp_path / "w.safetensors", DAMAGED[damage], bytes(64))
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file|holds no state dict"):
        read_tensors(tmp_path / "w.safetensors")
