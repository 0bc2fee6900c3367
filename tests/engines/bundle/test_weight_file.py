import hashlib
import json
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fastvar.core.dtypes import BY_NAME, storage_dtype
from fastvar.engines.bundle.weight_file import ALIGNMENT_BYTES, WeightFile, write_weights
from fastvar.engines.spec import TensorSpec
from fastvar.errors import BundleError, CheckpointError, InternalError, NumericsError


def specs(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()}


def bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Small whole numbers: finite in every type, whatever the bits mean."""
    return np.random.default_rng(seed).integers(0, 2, shape).astype(storage_dtype(dtype))


TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(sorted(BY_NAME)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(TENSORS)
def test_round_trip(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    arrays = {name: bits(*tensor) for name, tensor in tensors.items()}
    record = write_weights(path, specs(**tensors), arrays.__getitem__)
    data = path.read_bytes()
    assert (record.sha256, record.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    file = WeightFile(path)
    assert set(file.names) == set(arrays)
    for name, array in arrays.items():
        assert (file.dtype(name), file.shape(name)) == tensors[name]
        np.testing.assert_array_equal(file[name], array)


def test_the_reference_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16), "c": np.array(3)}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_weights(ours, specs(a=("float32", (2, 3)), b=("float16", (5,)), c=("int64", ())), arrays.__getitem__)
    save_file(arrays, theirs, metadata={"format": "pt"})
    for name, array in load_file(ours).items():
        np.testing.assert_array_equal(array, arrays[name])
    file = WeightFile(theirs)
    assert sorted(file) == ["a", "b", "c"]
    for name in file:
        np.testing.assert_array_equal(file[name], arrays[name])


def test_large_tensors_begin_on_a_cache_line_whatever_the_order(tmp_path):
    wanted = specs(odd=("uint8", (3,)), big=("float32", (64, 64)), half=("bfloat16", (32,)))
    write_weights(tmp_path / "w", wanted, lambda n: bits(wanted[n].dtype, wanted[n].shape))
    file = WeightFile(tmp_path / "w")
    for name in ("big", "half"):
        assert file.ref(name).address % ALIGNMENT_BYTES == 0
        assert file.ref(name).address == file[name].ctypes.data
    assert file.ref("half").dtype == "bfloat16"


def test_views_are_read_only_and_copy_nothing(tmp_path):
    write_weights(tmp_path / "w", specs(a=("float32", (4,))), lambda _: np.ones(4, np.float32))
    file = WeightFile(tmp_path / "w")
    assert np.shares_memory(file["a"], file["a"])
    with pytest.raises(ValueError, match="read-only"):
        file["a"][0] = 2


def test_strided_tensors_are_written_in_order(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_weights(tmp_path / "w", specs(a=("float32", (4, 3))), lambda _: values)
    np.testing.assert_array_equal(WeightFile(tmp_path / "w")["a"], values)


def test_one_tensor_at_a_time(tmp_path):
    alive = []

    def fetch(name):
        alive.append(name)
        return np.full(8, len(alive), np.float32)

    write_weights(tmp_path / "w", specs(a=("float32", (8,)), b=("float32", (8,))), fetch)
    assert alive == ["a", "b"]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float32", np.nan), ("float16", np.inf), ("float64", -np.inf), ("bfloat16", 0x7F80), ("bfloat16", 0xFFC0),
     ("float8_e4m3fn", 0xFF)],
)  # fmt: skip
def test_weights_that_are_not_finite(tmp_path, dtype, value):
    values = np.zeros(70, storage_dtype(dtype))
    values[69] = value
    with pytest.raises(NumericsError, match=rf"weight 'head' \({dtype}\)"):
        write_weights(tmp_path / "w", specs(head=(dtype, (70,))), lambda _: values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [np.zeros(3, np.float32), np.zeros(4, np.float16)])
def test_fetching_something_else_than_announced(tmp_path, values):
    with pytest.raises(InternalError, match=r"weight 'a': got .*, expected float32\[4\]"):
        write_weights(tmp_path / "w", specs(a=("float32", (4,))), lambda _: values)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # any write beyond fails, as on a full disk
    try:
        with pytest.raises(BundleError, match=r"cannot write .*: File too large"):
            write_weights(path, specs(a=("float32", (1 << 16,))), lambda _: np.zeros(1 << 16, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BundleError, match=r"cannot write .*nowhere"):
        write_weights(tmp_path / "nowhere" / "w", {}, lambda _: np.zeros(0))
    with pytest.raises(BundleError, match="cannot read"):
        WeightFile(tmp_path / "nowhere")


def _file(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _tensor(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\xff" * 64,
        (1 << 20).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"{no}",
        (4).to_bytes(8, "little") + b'"\xff"}',
        _file([]),
        _file({"a": 3}),
        _file({"a": {}}),
        _file(_tensor(), b"\0" * 15),
        _file(_tensor(offsets=(0, 12))),
        _file(_tensor(offsets=(4, 20))),
        _file(_tensor(offsets=(-16, 0))),
        _file(_tensor(shape=(-4,))),
        _file(_tensor(shape=("4",))),
        _file(_tensor(shape=(1 << 62, 4), offsets=(0, 16))),
        _file(_tensor(dtype="F4")),
        _file(_tensor(dtype=["F32"])),
        _file({f"t{i}": 0 for i in range(3)}),
    ],
)
def test_files_that_are_damaged(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(BundleError):
        WeightFile(tmp_path / "w")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=6))
def test_scribbles_give_a_bundle_error_or_a_readable_file(tmp_path_factory, position, scribble):
    path = tmp_path_factory.mktemp("weights") / "w"
    content = bytearray(
        _file({**_tensor(), "b": {"dtype": "F16", "shape": [2, 4], "data_offsets": [16, 32]}}, b"\0" * 32)
    )
    content[position : position + len(scribble)] = scribble
    path.write_bytes(content)
    try:
        file = WeightFile(path)
    except BundleError:
        return
    for name in file:
        assert file[name].nbytes <= 32


def test_a_tensor_that_is_not_there(tmp_path):
    write_weights(tmp_path / "w", specs(a=("float32", (1,))), lambda _: np.ones(1, np.float32))
    file = WeightFile(tmp_path / "w")
    assert "a" in file
    assert "b" not in file
    with pytest.raises(BundleError, match="holds no tensor 'b'"):
        file["b"]


def _layout(**offsets: tuple[int, int]) -> dict[str, object]:
    """float32 tensors at places of the data."""
    return {
        name: {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]}
        for name, (start, stop) in offsets.items()
    }


def _aligned(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("layout", "size", "match"),
    [
        (_layout(a=(0, 16), b=(8, 24)), 24, "'b' overlaps"),
        (_layout(a=(0, 16), b=(0, 16)), 16, "overlaps"),
        (_layout(a=(0, 64), b=(16, 32)), 64, "'b' overlaps"),
        (_layout(a=(2, 18)), 18, "'a' begins at byte .*, across its elements"),
        (_layout(a=(0, 16), b=(80, 96)), 96, "64 bytes before tensor 'b' belong to no tensor"),
        (_layout(a=(64, 80)), 80, "64 bytes before tensor 'a'"),
        (_layout(a=(0, 16)), 80, "64 bytes at its end belong to no tensor"),
        ({}, 64, "64 bytes at its end"),
    ],
)
def test_tensors_have_bytes_of_their_own_and_every_byte_a_tensor(tmp_path, layout, size, match):
    (tmp_path / "w").write_bytes(_aligned(layout, bytes(size)))
    with pytest.raises(BundleError, match=match):
        WeightFile(tmp_path / "w")


def test_gaps_that_align_are_no_harm(tmp_path):
    (tmp_path / "w").write_bytes(_aligned(_layout(b=(64, 80), a=(0, 4)), bytes(96)))
    assert sorted(WeightFile(tmp_path / "w")) == ["a", "b"]


def test_a_header_that_does_not_align_its_data(tmp_path):
    text = json.dumps(_layout(a=(0, 16))).encode()
    text += b" " * (-len(text) % 4 + 1)
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(BundleError, match="across its elements"):
        WeightFile(tmp_path / "w")


@pytest.mark.parametrize("twice", ['"a": {}, "a"', '"b": {"dtype": "F32", "dtype": "F16"}, "a"'])
def test_names_that_come_twice_in_the_header(tmp_path, twice):
    text = json.dumps(_layout(a=(0, 16))).replace('"a"', twice).encode()
    text += b" " * (-(len(text) + 8) % 64)
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(BundleError, match=r"names '.*' twice"):
        WeightFile(tmp_path / "w")


def test_a_checkpoint_that_cannot_be_read_is_not_a_disk_that_cannot_be_written(tmp_path):
    def fetch(_name):
        raise OSError(5, "Input/output error")

    with pytest.raises(CheckpointError, match="weight 'a' cannot be read"):
        write_weights(tmp_path / "w", specs(a=("float32", (4,))), fetch)
    assert list(tmp_path.iterdir()) == []
