"""Whether a bundle's precision, chosen by measurement on the CPU that built it, is the fastest on this CPU too.

Knows figures that were kept here before (engines/cache/product_speeds.py): nothing is measured, no library is imported.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from ...core.platform import cpu_identity
from ...core.precision import COMPUTE, Precision, speeds_told
from ...errors import OtherCpuWarning
from ..cache.engine_cache import default_folder
from ..cache.product_speeds import kept_speeds
from .manifest import Manifest


def precision_note(manifest: Manifest, kept: Path | None = None) -> str:
    """What to tell of a bundle that a build on this CPU would compute otherwise; empty where there is nothing to tell.

    That is so where its maker asked for the precision, where nothing was measured for it or on this CPU, where this is
    the CPU that built it, and where both CPUs are fastest in the same.

    Args:
        kept: the folder where measurements of this machine are kept; the default folder for None.
    """
    choice = manifest.precision_choice
    if choice is None or choice.asked or not choice.gflops or choice.cpu == (here := cpu_identity()):
        return ""
    found = kept_speeds(kept or default_folder(), here)
    if found is None or found.compute == manifest.precision.compute:
        return ""
    typed = next(word for word, name in COMPUTE.items() if name == found.compute)
    own = Precision(manifest.precision.compute).label
    return (
        f"the bundle computes in {own}, the fastest on the CPU that built it ({choice.cpu}): "
        f"here it is {typed}, with {speeds_told(found.gflops)} on {here}. "
        f"Build it here, or anywhere with --precision {typed}"
    )


def warn_of_another_cpu(manifest: Manifest) -> None:
    """`precision_note` as an `OtherCpuWarning`, at the line that called the caller."""
    if note := precision_note(manifest):
        warnings.warn(OtherCpuWarning(note), stacklevel=3)
