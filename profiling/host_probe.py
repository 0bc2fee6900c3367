"""Reads the memory of this process from the operating system: /proc on Linux, `resource` elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .samples import Peak, Probe, Sample, memory_of

if sys.platform != "win32":
    import resource

PROC = Path("/proc")
COUNTED = "resident set of this process, mapped weights included: the highest that the kernel counted (VmHWM)"
SAMPLED = "resident set of this process, mapped weights included: the highest of all samples (VmRSS)"
LIFETIME = "resident set of this process: the highest since it began, measured runs or not (getrusage)"
RESET_PEAK = "5"  # proc(5), clear_refs: resets the highest resident set to the current one


class HostProbe(Probe):
    """Reads the CPU. `proc` is the mount point of the process file system."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._counted_before = 0

    def start(self) -> None:
        try:
            (self._proc / "self" / "clear_refs").write_text(RESET_PEAK)
        except OSError:
            # Not permitted: the kernel's count is valid only if it rises above its present value.
            self._counted_before = self._status("VmHWM") or 0

    def sample(self, time_s: float) -> Sample:
        total, available = (self._read("meminfo", name) for name in ("MemTotal", "MemAvailable"))
        return Sample(
            time_s,
            process_bytes=self._status("VmRSS") or _lifetime_peak(),
            device_used_bytes=None if total is None or available is None else total - available,
            device_total_bytes=total,
        )

    def peak(self, samples: Sequence[Sample]) -> Peak:
        sampled, counted = max(memory_of(samples)), self._status("VmHWM")
        if counted is None:
            return Peak(sampled, LIFETIME)
        if counted > self._counted_before:
            return Peak(max(counted, sampled), COUNTED)
        return Peak(sampled, SAMPLED)

    def _status(self, field: str) -> int | None:
        return self._read("self/status", field)

    def _read(self, file: str, field: str) -> int | None:
        """Bytes of a line "field: n kB"; None without such a file or line."""
        try:
            text = (self._proc / file).read_text(errors="replace")
        except OSError:
            return None
        found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
        return int(found[1]) << 10 if found else None


def _lifetime_peak() -> int | None:
    if sys.platform == "win32":
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest << 10  # bytes there, KiB elsewhere
