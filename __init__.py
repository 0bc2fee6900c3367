"""fastvar: ahead-of-time engines for next-scale visual autoregressive models with cached token pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.version import __version__
from .errors import ImagesFailed, PipelineBusy

if TYPE_CHECKING:
    from .export.build import build
    from .export.conversion.convert import convert
    from .export.options import BuildOptions
    from .runtime.pipeline import Pipeline
    from .runtime.requests.inputs import UNCONDITIONAL
    from .runtime.requests.params import SamplingParams

__all__ = [
    "UNCONDITIONAL",
    "BuildOptions",
    "ImagesFailed",
    "Pipeline",
    "PipelineBusy",
    "SamplingParams",
    "__version__",
    "build",
    "convert",
]
# Imported when first used, so that `import fastvar` costs milliseconds and the runtime never meets torch.
_LAZY = {
    "BuildOptions": ".export.options",
    "Pipeline": ".runtime.pipeline",
    "SamplingParams": ".runtime.requests.params",
    "UNCONDITIONAL": ".runtime.requests.inputs",
    "build": ".export.build",
    "convert": ".export.conversion.convert",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastvar' has no attribute {name!r}")
    from importlib import import_module

    if not _LAZY[name].startswith(".export"):
        return getattr(import_module(_LAZY[name], __name__), name)
    from .core.platform import needs_extra

    with needs_extra("export"):
        return getattr(import_module(_LAZY[name], __name__), name)
