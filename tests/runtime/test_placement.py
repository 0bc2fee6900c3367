"""Where buffers lie: apart while they live together, and in no more room than the fullest phase needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.engines.device import ALIGNMENT
from fastvar.runtime.placement import Need, Phase, aligned, place

later = [phase for phase in Phase if phase != Phase.ENCODE]
lives = [(Phase.ENCODE, Phase.ENCODE), *itertools.combinations_with_replacement(later, 2)]
phases = st.sampled_from(lives)  # what the image encoder uses serves nothing else
needs = st.dictionaries(
    st.integers(0, 30).map(str), st.builds(lambda size, life: Need(size, *life), st.integers(0, 5000), phases)
)


def live_bytes(wanted: Mapping[str, Need]) -> int:
    """Of the fullest phase; an arena cannot be smaller."""
    return max(sum(aligned(n.size) for n in wanted.values() if n.first <= phase <= n.last) for phase in Phase)


@settings(max_examples=300, deadline=None)
@given(needs)
def test_buffers_that_live_together_lie_apart(wanted: dict[str, Need]):
    slots, arena = place(wanted)
    assert slots.keys() == wanted.keys()
    for name, slot in slots.items():
        assert (slot.size, slot.first, slot.last) == (wanted[name].size, wanted[name].first, wanted[name].last)
        assert slot.offset % ALIGNMENT == 0
        assert slot.offset + slot.size <= arena
    for one, other in itertools.combinations(slots.values(), 2):
        if one.first <= other.last and other.first <= one.last and one.size and other.size:
            assert one.offset + one.size <= other.offset or other.offset + other.size <= one.offset


@settings(max_examples=300, deadline=None)
@given(needs)
def test_arena_is_as_small_as_the_fullest_phase(wanted: dict[str, Need]):
    assert place(wanted)[1] == live_bytes(wanted)


def test_nothing_to_place():
    assert place({}) == ({}, 0)


def test_buffers_of_different_phases_share_their_place():
    wanted = {phase.name: Need(1000, phase, phase) for phase in Phase}
    slots, arena = place(wanted)
    assert {slot.offset for slot in slots.values()} == {0}
    assert arena == aligned(1000)
