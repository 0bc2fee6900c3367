import lzma
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.engines.unpacking import UnpackingError, declared_size, unpack_xz

BOMB = lzma.compress(bytes(50 << 20))


@pytest.mark.parametrize("preset", [0, 1, 6, 9])
@pytest.mark.parametrize("data", [b"", b"a", b"library" * 9999, bytes(300_000)], ids=len)
def test_what_was_packed_comes_back(data, preset):
    assert unpack_xz(lzma.compress(data, preset=preset)) == data
    assert declared_size(lzma.compress(data, preset=preset)) == len(data)


def test_a_bomb_is_refused_by_what_it_declares():
    assert len(BOMB) < 10_000
    with pytest.raises(UnpackingError, match=f"would unpack to {50 << 20} bytes, at most 1000 are allowed"):
        unpack_xz(BOMB, limit=1000)


def test_a_bomb_that_declares_little_is_not_unpacked_beyond_that(monkeypatch):
    from fastvar.engines import unpacking

    monkeypatch.setattr(unpacking, "declared_size", lambda _: 100)
    tracemalloc.start()
    try:
        with pytest.raises(UnpackingError, match="does not unpack to the 100 bytes"):
            unpack_xz(BOMB, limit=1000)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20  # the unpacker's dictionary, not what would come of it
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", [b"", b"no xz at all, but long enough", lzma.compress(b"x", format=lzma.FORMAT_ALONE)])
def test_other_formats(data):
    with pytest.raises(UnpackingError):
        unpack_xz(data)


def test_two_streams_or_something_behind(tmp_path):
    for data in (lzma.compress(b"a") + lzma.compress(b"b"), lzma.compress(b"a") + b"behind"):
        with pytest.raises(UnpackingError):
            unpack_xz(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 10), st.binary(min_size=1, max_size=8))
def test_damage_is_told_or_harmless(position, scribble):
    data = bytearray(lzma.compress(b"library" * 100))
    position %= len(data)
    data[position : position + len(scribble)] = scribble
    with suppress(UnpackingError):
        assert unpack_xz(bytes(data)) == b"library" * 100
