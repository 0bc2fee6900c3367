"""Libraries too large for a wheel's compression, packed for machines without a network; standard library only."""

from __future__ import annotations

import io
import lzma
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

PACKED = ("tensorrt_rtx*", "tensorrt_rtx_libs")
MOST_BYTES = 2 << 30  # of an unpacked archive: TensorRT-RTX takes a quarter of it
MOST_FILES = 20_000
HALVES = (".1", ".2")
DICTIONARY_BYTES = 256 << 20
FILTERS = [
    {"id": lzma.FILTER_X86},
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": DICTIONARY_BYTES,
        "lc": 4,
        "lp": 0,
        "pb": 0,
    },
]


def pack(packages: Path, out: Path) -> Path:
    """The TensorRT-RTX packages of an environment as one archive.

    The archive appears under its name only once it is whole.
    """
    folders = sorted({folder for pattern in PACKED for folder in packages.glob(pattern) if folder.is_dir()})
    if not folders:
        sys.exit(f"error: no TensorRT-RTX in {packages}\nfix: pip install 'fastvar-runtime[tensorrt-rtx]'")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tensorrt-rtx.tar.xz"
    partial = path.with_suffix(".partial")
    with lzma.open(partial, "wb", filters=FILTERS) as packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for folder in folders:
            archive.add(folder, folder.name, filter=_without_caches)
    os.replace(partial, path)
    return path


def halve(archive: Path) -> list[Path]:
    """An archive as two files in its place, for who carries less at a time than it takes."""
    content = archive.read_bytes()
    middle, parts = (len(content) + 1) // 2, []
    for half, piece in zip(HALVES, (content[:middle], content[middle:]), strict=True):
        parts.append(archive.with_name(archive.name + half))
        parts[-1].write_bytes(piece)
    archive.unlink()
    return parts


class _Joined(io.RawIOBase):
    """Files one behind the other, as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._left = iter(paths)
        self._file = next(self._left).open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._file.closed:  # behind the last one
            return 0
        while not (count := self._file.readinto(buffer)):
            self._file.close()
            following = next(self._left, None)
            if following is None:
                return 0
            self._file = following.open("rb")
        return count


def unpack(archive: Path, packages: Path, parts: Sequence[Path] = ()) -> None:
    """An archive made by `pack`, into an environment.

    Refused are members that lead outside of it or are no files, and archives that unpack to more than TensorRT-RTX ever
    took. What was unpacked before stays.

    Args:
        archive: its name, and itself unless there are parts.
        parts: the files that it consists of, in order.
    """
    bytes_left, files_left = MOST_BYTES, MOST_FILES
    try:
        with (
            io.BufferedReader(cast(io.RawIOBase, _Joined(parts or [archive]))) as whole,
            lzma.LZMAFile(whole) as packed,
            tarfile.open(fileobj=cast(io.BytesIO, limited(archive, packed)), mode="r|") as members,
        ):
            for member in _checked(archive, members):
                bytes_left, files_left = bytes_left - member.size, files_left - 1
                if bytes_left < 0 or files_left < 0:
                    _refuse(archive, f"at most {MOST_BYTES} bytes in {MOST_FILES} files")
                target = packages / member.name
                if not target.resolve().is_relative_to(packages.resolve()):  # through a link that lies there
                    _refuse(archive, "files of one environment", member.name)
                members.extract(member, packages, **_SAFELY)
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        sys.exit(f"error: {archive} is no whole archive: {error}")


_SAFELY: Any = (
    {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
)  # 3.10 and 3.11 have it since their later ones


def _checked(archive: Path, members: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in members:
        outside = member.name.startswith("/") or ".." in Path(member.name).parts
        if outside or not (member.isfile() or member.isdir()):
            _refuse(archive, "files of one environment", member.name)
        yield member


def limited(archive: Path, packed: lzma.LZMAFile) -> _Limited:
    return _Limited(archive, packed, MOST_BYTES + (MOST_FILES << 10))


class _Limited:
    """A stream that ends the program when it gives more than it may: what a header says of sizes need not be true."""

    def __init__(self, archive: Path, stream: lzma.LZMAFile, limit: int) -> None:
        self._archive, self._stream, self._left = archive, stream, limit

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        self._left -= len(found)
        if self._left < 0:
            _refuse(self._archive, f"at most {MOST_BYTES} bytes")
        return found


def _refuse(archive: Path, expected: str, member: str = "") -> None:
    held = f" holds {member!r}" if member else " holds more than it may"
    sys.exit(f"error: {archive}{held}\nexpected: {expected}")


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member
