import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvar.errors import CheckpointError, NumericsError
from fastvar.export.checkpoints.tensor_files import (
    check_finite,
    check_state,
    digest,
    read_json,
    read_shards,
    read_tensors,
)

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(1).half()}


class RunsCode:
    """Unpickled, creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def _equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_round_trip(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    save_file(STATE, file) if suffix == ".safetensors" else torch.save(STATE, file)
    _equal(read_tensors(file), STATE)


def test_files_of_old_torch(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    _equal(read_tensors(tmp_path / "old.pth"), STATE)


def test_torch_files_are_mapped_not_read(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "w.pth")
    seen = {}
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: seen.update(kwargs) or load(*args, **kwargs))
    read_tensors(tmp_path / "w.pth")
    assert seen["mmap"] is True
    assert seen["weights_only"] is True


def test_entries_that_are_not_tensors(tmp_path):
    torch.save({**STATE, "step": 3}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth holds 1 entries that are not tensors: step"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize("raw", [False, True], ids=["torch zip", "bare pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, raw):
    marker, file = tmp_path / "marker", tmp_path / "w.pth"
    content = {**STATE, "x": RunsCode(marker)}
    if raw:
        file.write_bytes(pickle.dumps(RunsCode(marker), protocol=2))
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match="was refused"):
        read_tensors(file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(RunsCode(marker)))  # the trap does work
    assert marker.exists()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_torch_file_cut_short(tmp_path, old, share):
    file = tmp_path / "w.pth"
    torch.save({"a": torch.randn(5000)}, file, _use_new_zipfile_serialization=not old)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="fetch the file again"):
        read_tensors(file)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_safetensors_file_cut_short(tmp_path, share):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.randn(100)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_tensors(file)


def test_a_torch_file_under_the_wrong_name(tmp_path):
    torch.save(STATE, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "w.safetensors")


def test_an_absurd_safetensors_header(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull")],
)
def test_files_that_are_not_there_yet(tmp_path, suffix, content, complaint):
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        read_tensors(file)


def test_text_instead_of_a_checkpoint(tmp_path):
    (tmp_path / "w.pth").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="not a torch checkpoint"):
        read_tensors(tmp_path / "w.pth")


def test_missing_file_folder_and_unknown_suffix(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(tmp_path / "w.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        read_tensors(tmp_path / "folder.pth")
    (tmp_path / "w.onnx").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="not a checkpoint file"):
        read_tensors(tmp_path / "w.onnx")


def test_permission_denied(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "w.pth")

    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may read anything, so the mode bits prove nothing
    with pytest.raises(CheckpointError, match="Permission denied") as error:
        read_tensors(tmp_path / "w.pth")
    assert "permissions" in error.value.fix


@pytest.mark.parametrize("content", [[1, 2], {}, torch.zeros(2)])
def test_a_torch_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_tensors(tmp_path / "w.pth")


def test_shards(tmp_path):
    save_file({"a": STATE["a"]}, tmp_path / "m-1.safetensors")
    save_file({"b": STATE["b"], "c": STATE["c"]}, tmp_path / "m-2.safetensors")
    index = tmp_path / "m.index.json"
    shards = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    _equal(read_shards(index), STATE)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}'])
def test_an_index_that_names_no_neighbours(tmp_path, content):
    (tmp_path / "m.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="names no shards"):
        read_shards(tmp_path / "m.index.json")


@pytest.mark.parametrize(("content", "complaint"), [("{", "not JSON"), ("[]", "a JSON list")])
def test_json_that_is_no_object(tmp_path, content, complaint):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        read_json(tmp_path / "c.json")


def test_a_state_that_fits():
    check_state(STATE, {"a": (2, 3), "b": (4,), "c": (1,)})


def test_missing_extra_and_misshapen_tensors_are_named_and_counted():
    expected = {"a": (3, 2), **{f"layer.{i}": (1,) for i in range(8)}}
    with pytest.raises(CheckpointError) as error:
        check_state(STATE, expected, "w.pth")
    problem = error.value.problem
    assert "8 tensors missing: layer.0, layer.1, layer.2, layer.3, layer.4 and 3 more" in problem
    assert "2 tensors not part of the model: b, c" in problem
    assert "1 tensors of another shape: a [2, 3] instead of [3, 2]" in problem
    assert "w.pth" in problem
    assert "config.json" in error.value.fix


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.int64])
def test_types_that_are_not_read(dtype):
    with pytest.raises(CheckpointError, match="of another type: a torch"):
        check_state({"a": torch.zeros(2, dtype=dtype)}, {"a": (2,)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(dtype, value):
    bad = torch.zeros(3, 3, dtype=dtype)
    check_finite({"good": bad.clone(), "empty": bad[:0]})
    bad[1, 2] = value
    with pytest.raises(NumericsError, match="tensor bad"):
        check_finite({"good": torch.ones(2), "bad": bad})


def test_digest_follows_contents_not_places(tmp_path):
    one, two, moved = tmp_path / "one", tmp_path / "two", tmp_path / "moved"
    one.write_bytes(b"ab")
    two.write_bytes(b"c")
    first = digest([one, two], "x")
    one.rename(moved)
    assert digest([moved, two], "x") == first
    assert digest([two, moved], "x") != first
    assert digest([moved, two], "y") != first
    moved.write_bytes(b"a")
    two.write_bytes(b"bc")  # the same bytes in all, cut elsewhere
    assert digest([moved, two], "x") != first
