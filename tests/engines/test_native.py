import pytest

from fastvar.engines import native
from fastvar.errors import BuildError


def test_without_a_compiler_nothing_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_compiler", lambda: ["no-such-compiler"])
    with pytest.raises(BuildError, match=r"(?s)no-such-compiler.*install a C\+\+ compiler"):
        native.build(tmp_path)
    assert not any(tmp_path.iterdir())


def test_another_source_is_another_digest(monkeypatch, tmp_path):
    before = native.source_digest()
    for name in native.SOURCES:
        (tmp_path / name).write_bytes((native.KERNELS / name).read_bytes())
    monkeypatch.setattr(native, "KERNELS", tmp_path)
    assert native.source_digest() == before
    (tmp_path / "linear.cpp").write_text("// changed")
    assert native.source_digest() != before
