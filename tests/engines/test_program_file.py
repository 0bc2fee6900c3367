import numpy as np
import pytest

from fastvar.engines.program_file import ProgramFile
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


def test_same_content_same_bytes():
    assert ProgramFile.of(b"library").to_bytes() == ProgramFile.of(b"library").to_bytes()


@pytest.mark.parametrize("data", [b"", b"no engine", ProgramFile.of(b"library").to_bytes()[:-5]], ids=len)
def test_refuses_other_files(data: bytes):
    with pytest.raises(BundleError, match="not an engine of AOTInductor"):
        ProgramFile.from_bytes(data)
