from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import save

from fastvar.engines.aotinductor import engine_file as program_file
from fastvar.engines.aotinductor.engine_file import ProgramFile
from fastvar.engines.unpacking import unpack_xz
from fastvar.errors import BundleError


def test_comes_back_as_it_went_with_constants_in_order():
    names = ("rotary", "level", "a", "enlarge_0")
    constants = {name: np.arange(n + 1, dtype=np.float32) for n, name in enumerate(names)}
    file = ProgramFile.of(b"\x7fELF" * 1000, constants)
    found = ProgramFile.from_bytes(file.to_bytes())
    assert found.library == file.library
    assert list(found.constants) == list(constants)
    for name, value in constants.items():
        np.testing.assert_array_equal(found.constants[name], value)


def test_says_which_inputs_are_weights_of_linear_layers():
    file = ProgramFile.of(b"library", {"a": np.zeros(2, np.float32)}, (4, 2))
    assert ProgramFile.from_bytes(file.to_bytes()).linear_weights == (4, 2)
    given_constants = replace(ProgramFile.from_bytes(file.to_bytes()), constants={})
    assert ProgramFile.from_bytes(given_constants.to_bytes()).linear_weights == (4, 2)
    assert ProgramFile.from_bytes(ProgramFile.of(b"library").to_bytes()).linear_weights == ()


def told(words: str) -> bytes:
    return bytes(save({"library": np.zeros(3, np.uint8)}, metadata={"linear_weights": words}))


@pytest.mark.parametrize("words", ["[0]", "[-1]", "three", "3", '["x"]', "null"])
def test_refuses_places_that_are_none(words: str):
    with pytest.raises(BundleError, match="not an engine of AOTInductor"):
        ProgramFile.from_bytes(told(words))


def test_same_content_same_bytes():
    assert ProgramFile.of(b"library").to_bytes() == ProgramFile.of(b"library").to_bytes()


def named(name: str) -> bytes:
    return bytes(save({"library": np.zeros(3, np.uint8), name: np.zeros(3, np.float32)}))


@pytest.mark.parametrize(
    "data",
    [b"", b"no engine", ProgramFile.of(b"library").to_bytes()[:-5], named("rotary"), named("²0.rotary")],
    ids=["empty", "other", "cut", "unnumbered", "no number"],
)
def test_refuses_other_files(data: bytes):
    with pytest.raises(BundleError, match="not an engine of AOTInductor"):
        ProgramFile.from_bytes(data)


def test_a_library_that_unpacks_to_more_than_allowed_is_refused(monkeypatch):
    monkeypatch.setattr(program_file, "unpack_xz", partial(unpack_xz, limit=10_000))
    assert ProgramFile.of(b"\0" * 10_000).library == b"\0" * 10_000
    with pytest.raises(BundleError, match="would unpack to 10001 bytes"):
        ProgramFile.of(b"\0" * 10_001).library  # noqa: B018
