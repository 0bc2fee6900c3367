"""What this machine offers. Nothing is imported for it."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that this process may run on; quotas of a container do not show here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
