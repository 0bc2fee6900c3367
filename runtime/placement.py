"""Where buffers lie in an arena: those that are never alive together may share their bytes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from ..engines.device import ALIGNMENT


class Phase(IntEnum):
    """The parts of a generation, in order."""

    TEXT = 0  # text encoder, condition, text keys and values
    SCALES = 1
    DECODE = 2


@dataclass(frozen=True)
class Need:
    """A buffer before it has a place: bytes, and the phases it is alive from and to, both included."""

    size: int
    first: Phase
    last: Phase

    def joined(self, other: Need) -> Need:
        """What serves both."""
        return Need(max(self.size, other.size), min(self.first, other.first), max(self.last, other.last))

    def meets(self, other: Need) -> bool:
        """Whether both are alive at some time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Slot:
    """A named piece of the arena. Offsets and sizes in bytes; alive from `first` to `last`."""

    name: str
    offset: int
    size: int
    first: Phase
    last: Phase


def place(needs: Mapping[str, Need]) -> tuple[dict[str, Slot], int]:
    """Offsets for all buffers, and the size of the arena.

    Buffers of one lifetime lie side by side as a block; then every block, the largest first, goes to the lowest
    place that is free throughout its life. Three phases make six lifetimes, so this is as good as it gets.
    """
    blocks: dict[tuple[Phase, Phase], dict[str, Need]] = {}
    for name, need in needs.items():
        blocks.setdefault((need.first, need.last), {})[name] = need
    slots: dict[str, Slot] = {}
    placed: list[tuple[int, Need]] = []  # offset and need of whole blocks
    for (first, last), members in sorted(blocks.items(), key=lambda item: (-_length(item[1]), item[0])):
        block = Need(_length(members), first, last)
        offset = start = _lowest(block, placed)
        for name, need in members.items():
            slots[name] = Slot(name, offset, need.size, first, last)
            offset += aligned(need.size)
        placed.append((start, block))
    return slots, max((offset + block.size for offset, block in placed), default=0)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _length(members: Mapping[str, Need]) -> int:
    return sum(aligned(need.size) for need in members.values())


def _lowest(block: Need, placed: list[tuple[int, Need]]) -> int:
    in_the_way = sorted((offset, other.size) for offset, other in placed if other.meets(block))
    start = 0
    for offset, size in in_the_way:
        if start + block.size <= offset:
            break
        start = max(start, offset + size)
    return start
