"""What a process finds on its machine: optional packages, one that is missing names the extra that brings it; the CPU,
cores and memory, as the system and the container tell of them."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import BackendError

# What importing a package raises that is missing, broken, or beside the wrong version of another; some look for a
# driver as soon as they are imported.
FAILURES = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
_OURS = __name__.partition(".")[0]


def import_extra(module: str, extra: str, *, expected: str = "") -> Any:
    """A module of an optional package.

    Raises:
        BackendError: it is not installed, or does not load on this machine.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise _missing(module, extra, error, expected) from error


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """A block, or a decorated function, that imports packages of an extra, wherever in what it calls.

    Raises:
        BackendError: one of them is not installed, or does not load on this machine.
    """
    try:
        yield
    except FAILURES as error:
        package = _package_not_imported(error)
        if not package:
            raise
        raise _missing(package, extra, error) from error


def _missing(module: str, extra: str, error: Exception, expected: str = "") -> BackendError:
    return BackendError(
        f"{module} cannot be imported: {error}", expected=expected, fix=f'pip install "fastvar-runtime[{extra}]"'
    )


def _package_not_imported(error: Exception) -> str:
    """The package of others whose import an error stopped; empty where it is no import's error, or of our modules."""
    if isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        return "" if package == _OURS else package
    for name in _modules_under_way(error.__traceback__):
        if name != _OURS:
            return name
    return ""


def _modules_under_way(traceback: TracebackType | None) -> Iterator[str]:
    """Packages of the modules whose bodies ran when an exception was raised, the outermost first."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "<module>":
            yield str(frame.f_globals.get("__name__", "")).partition(".")[0]
        traceback = traceback.tb_next


_CPUINFO = Path("/proc/cpuinfo")
# CPU features that decide which kernels run: Linux names of x86 and Arm flags.
CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
    "amx_int8",
    "asimddp",
    "bf16",
    "sve",
)


def cpu_model() -> str:
    """The CPU's name; its architecture where the system tells no name."""
    return _of_cpu(_text(_CPUINFO), "model name", "Hardware") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of CPU_FEATURES that the system lets programs use; none where it does not tell."""
    flags = set(_of_cpu(_text(_CPUINFO), "flags", "Features").split())
    return [feature for feature in CPU_FEATURES if feature in flags]


def cpu_identity() -> str:
    """The CPU's name and generation, by which what was measured on it is kept: hypervisors give several one name."""
    text = _text(_CPUINFO)
    numbers = [("family", "cpu family", "CPU implementer"), ("model", "model", "CPU part"), ("stepping", "stepping")]
    told = [f"{word} {found}" for word, *keys in numbers if (found := _of_cpu(text, *keys))]
    return ", ".join((cpu_model(), *told))


def _of_cpu(text: str, *keys: str) -> str:
    """The first line of /proc/cpuinfo with one of the keys; empty where there is none."""
    found = re.search(rf"^(?:{'|'.join(keys)})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


_PROC = Path("/proc/self")


_UNLIMITED_BYTES = 1 << 60  # version 1 writes a number near 2^63 where there is no limit


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, and the CPU quota of its container, rounded down.

    Rounded down, since a thread beyond the quota is suspended while the others wait for it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota() -> float | None:
    """Cores' worth of time that the container grants, the least of all its groups; None without a limit."""
    return min((q for group in _groups("cpu") if (q := _quota_of(group)) is not None), default=None)


def memory_bytes() -> int | None:
    """Memory of the machine, or the container's limit where that is less; None where it cannot be told."""
    known = (physical_memory_bytes(), memory_limit_bytes())
    return min((n for n in known if n is not None), default=None)


def physical_memory_bytes() -> int | None:
    """Memory of the machine; None where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not a Unix
        return None


def memory_limit_bytes() -> int | None:
    """The container's memory limit, the least of all its groups; None without a limit."""
    limits = (_number(group / name) for group in _groups("memory") for name in ("memory.max", "memory.limit_in_bytes"))
    return min((n for n in limits if n is not None and n < _UNLIMITED_BYTES), default=None)


def _quota_of(group: Path) -> float | None:
    """Of a group's `cpu.max` (version 2), or its quota and period in two files (version 1)."""
    words = _text(group / "cpu.max").split()
    if len(words) == 2:
        return _ratio(words[0], words[1])
    return _ratio(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    try:
        found = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return found if found > 0 else None


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's group and of its parents, in the hierarchies that may hold a controller."""
    paths = _own_groups()
    for mount, root, controllers in _mounts():
        if controllers is not None and controller not in controllers:
            continue
        own = next(
            (
                path
                for names, path in paths
                if (names is None) == (controllers is None) and (names is None or controller in names)
            ),
            None,
        )
        if own is None:
            continue
        # Seen from inside a container the mount may be the group itself, whatever the group is called outside.
        inside = _below(own, root)
        for depth in range(len(inside), -1, -1):
            yield mount.joinpath(*inside[:depth])


def _below(path: str, root: str) -> tuple[str, ...]:
    parts, top = [p for p in path.split("/") if p], [p for p in root.split("/") if p]
    if parts[: len(top)] == top:
        parts = parts[len(top) :]
    return () if ".." in parts else tuple(parts)


def _own_groups() -> list[tuple[frozenset[str] | None, str]]:
    """(controllers, path) of every hierarchy this process is in; None for the one of version 2."""
    found: list[tuple[frozenset[str] | None, str]] = []
    for line in _text(_PROC / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        found.append((None if number == "0" and not controllers else frozenset(controllers.split(",")), path))
    return found


def _mounts() -> Iterator[tuple[Path, str, frozenset[str] | None]]:
    """(mount point, root of what is mounted, controllers) of every mounted hierarchy; None for version 2."""
    for line in _text(_PROC / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            yield Path(fields[4]), fields[3], None
        elif kind[0] == "cgroup":
            yield Path(fields[4]), fields[3], frozenset(kind[2].split(","))


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
