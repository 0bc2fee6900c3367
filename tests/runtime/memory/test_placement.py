"""Where buffers lie: apart while they live together, and in no more room than the fullest phase needs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.engines.device import ALIGNMENT
from fastvar.runtime.memory.placement import Buffer, BufferRequest, Phase, aligned, place

later = [phase for phase in Phase if phase != Phase.ENCODE]
lives = [(Phase.ENCODE, Phase.ENCODE), *itertools.combinations_with_replacement(later, 2)]
phases = st.sampled_from(lives)  # what the image encoder uses serves nothing else
requests = st.dictionaries(
    st.integers(0, 30).map(str), st.builds(lambda size, life: BufferRequest(size, *life), st.integers(0, 5000), phases)
)


def live_bytes(wanted: Mapping[str, BufferRequest]) -> int:
    """Of the fullest phase; an arena cannot be smaller."""
    return max(sum(aligned(n.size) for n in wanted.values() if n.first <= phase <= n.last) for phase in Phase)


@settings(max_examples=300, deadline=None)
@given(requests)
def test_buffers_that_live_together_lie_apart(wanted: dict[str, BufferRequest]):
    buffers, arena = place(wanted)
    assert buffers.keys() == wanted.keys()
    for name, buffer in buffers.items():
        assert (buffer.size, buffer.first, buffer.last) == (wanted[name].size, wanted[name].first, wanted[name].last)
        assert buffer.offset % ALIGNMENT == 0
        assert buffer.offset + buffer.size <= arena
    for one, other in itertools.combinations(buffers.values(), 2):
        if one.first <= other.last and other.first <= one.last and one.size and other.size:
            assert one.offset + one.size <= other.offset or other.offset + other.size <= one.offset


@settings(max_examples=300, deadline=None)
@given(requests)
def test_arena_is_as_small_as_the_fullest_phase(wanted: dict[str, BufferRequest]):
    assert place(wanted)[1] == live_bytes(wanted)


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 256), (255, 256), (256, 256), (257, 512), (1000, 1024)])
def test_sizes_are_rounded_up_to_what_libraries_want(size: int, expected: int):
    assert ALIGNMENT == 256
    assert aligned(size) == expected


def test_phases_are_in_the_order_of_a_generation():
    assert [(phase.name, int(phase)) for phase in Phase] == [("ENCODE", 0), ("TEXT", 1), ("SCALES", 2), ("DECODE", 3)]


def test_what_serves_two_needs_is_as_large_and_lives_as_long_as_both():
    one, other = BufferRequest(100, Phase.TEXT, Phase.SCALES), BufferRequest(300, Phase.SCALES, Phase.DECODE)
    assert one.joined(other) == other.joined(one) == BufferRequest(300, Phase.TEXT, Phase.DECODE)
    assert one.joined(BufferRequest(1, Phase.TEXT, Phase.TEXT)) == one


@pytest.mark.parametrize("value", [BufferRequest(1, Phase.TEXT, Phase.TEXT), Buffer("x", 0, 1, Phase.TEXT, Phase.TEXT)])
def test_places_are_values(value: BufferRequest | Buffer):
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.size = 2


def test_nothing_to_place():
    assert place({}) == ({}, 0)


def test_buffers_of_different_phases_share_their_place():
    wanted = {phase.name: BufferRequest(1000, phase, phase) for phase in Phase}
    buffers, arena = place(wanted)
    assert {buffer.offset for buffer in buffers.values()} == {0}
    assert arena == aligned(1000)
