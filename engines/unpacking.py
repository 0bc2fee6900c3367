"""xz unpacked within a limit: a few bytes must not become more than a machine holds."""

from __future__ import annotations

import lzma

MOST_BYTES = 1 << 30  # of an engine: it holds no weights
_MOST_MEMORY = 1 << 28  # of the unpacker: the highest preset takes 65 MiB
_FOOTER_BYTES, _MAGIC = 12, b"YZ"


class UnpackingError(ValueError):
    """Not packed with xz, or larger than allowed."""


def unpack_xz(data: bytes, limit: int = MOST_BYTES) -> bytes:
    """What `lzma.compress` packed.

    The size that the file declares is looked at first, and not believed: no more than that is unpacked.

    Raises:
        UnpackingError: damaged, or more than `limit` bytes.
    """
    declared = declared_size(data)
    if declared > limit:
        raise UnpackingError(f"it would unpack to {declared} bytes, at most {limit} are allowed")
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)
    try:
        found = unpacker.decompress(data, max_length=declared + 1)
    except lzma.LZMAError as error:
        raise UnpackingError(str(error)) from error
    if len(found) != declared or not unpacker.eof or unpacker.unused_data:
        raise UnpackingError(f"it does not unpack to the {declared} bytes that it declares")
    return found


def declared_size(data: bytes) -> int:
    """Bytes that an xz stream says it holds: the sum over the index before its footer.

    Raises:
        UnpackingError: it has no such index.
    """
    footer = data[-_FOOTER_BYTES:]
    index_bytes = 4 * (int.from_bytes(footer[4:8], "little") + 1)
    start = len(data) - _FOOTER_BYTES - index_bytes
    if len(footer) < _FOOTER_BYTES or footer[-2:] != _MAGIC or start < 0 or data[start] != 0:
        raise UnpackingError("it is not a whole xz stream")
    index = data[start + 1 : -_FOOTER_BYTES]
    records, position = _number(index, 0)
    total = 0
    for _ in range(records):
        _, position = _number(index, position)
        size, position = _number(index, position)
        total += size
    return total


def _number(data: bytes, position: int) -> tuple[int, int]:
    """A number of variable length, seven bits a byte, the lowest first; and the position behind it."""
    value = 0
    for shift in range(0, 63, 7):
        if position >= len(data):
            break
        value |= (data[position] & 0x7F) << shift
        position += 1
        if not data[position - 1] & 0x80:
            return value, position
    raise UnpackingError("its index is damaged")
