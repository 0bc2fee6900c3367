"""fastvar: ahead-of-time engines for next-scale visual autoregressive models with cached token pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.version import __version__
from .errors import PipelineBusy

if TYPE_CHECKING:
    from .export.build import build
    from .runtime.pipeline import Pipeline

__all__ = ["Pipeline", "PipelineBusy", "__version__", "build"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import fastvar` costs milliseconds and the runtime never meets torch.
    if name == "Pipeline":
        from .runtime.pipeline import Pipeline

        return Pipeline
    if name == "build":
        from .core.platform import needs_extra

        with needs_extra("export"):
            from .export.build import build

        return build
    raise AttributeError(f"module 'fastvar' has no attribute {name!r}")
