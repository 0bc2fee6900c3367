"""Where buffers lie in an arena: those that are never alive together may share their bytes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import product

from ...engines.device import ALIGNMENT


class Phase(IntEnum):
    """The parts of a generation, in order."""

    ENCODE = 0  # the image encoder, where an image is given; what it writes goes to the host
    TEXT = 1  # text encoder, condition, text keys and values
    SCALES = 2
    DECODE = 3


@dataclass(frozen=True)
class BufferRequest:
    """A buffer before it has a place: bytes, and the phases it is alive from and to, both included."""

    size: int
    first: Phase
    last: Phase

    def joined(self, other: BufferRequest) -> BufferRequest:
        """What serves both."""
        return BufferRequest(max(self.size, other.size), min(self.first, other.first), max(self.last, other.last))


@dataclass(frozen=True)
class Buffer:
    """A named piece of the arena. Offsets and sizes in bytes; alive from `first` to `last`."""

    name: str
    offset: int
    size: int
    first: Phase
    last: Phase


def place(requests: Mapping[str, BufferRequest]) -> tuple[dict[str, Buffer], int]:
    """Offsets for all buffers, and the size of the arena: the most that is alive in any phase.

    Buffers of one lifetime lie side by side as a block. What is always alive lies at the bottom, what dies before
    the last phase above it, what is born after the first at the very top; what lives in one phase only has the room
    between its neighbours. The image encoder has all of it: no buffer of its phase lives on.
    """
    encode, text, scales, decode = Phase
    sizes = dict.fromkeys(product(Phase, Phase), 0)
    for request in requests.values():
        sizes[request.first, request.last] += aligned(request.size)
    always, early, late = sizes[text, decode], sizes[text, scales], sizes[scales, decode]
    alone = {phase: sizes[phase, phase] for phase in Phase}
    total = always + max(early + alone[text], early + alone[scales] + late, late + alone[decode])
    total = max(total, alone[encode])
    ends = {
        (encode, encode): 0,
        (text, decode): 0,
        (text, scales): always,
        (text, text): always + early,
        (scales, scales): always + early,
        (decode, decode): always,
        (scales, decode): total - late,
    }
    buffers: dict[str, Buffer] = {}
    for name, request in requests.items():
        offset = ends[request.first, request.last]
        buffers[name] = Buffer(name, offset, request.size, request.first, request.last)
        ends[request.first, request.last] = offset + aligned(request.size)
    return buffers, total


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
