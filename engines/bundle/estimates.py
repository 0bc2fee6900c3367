"""Memory that a bundle's engines work in, estimated where no compiler has reported it."""

from __future__ import annotations

from dataclasses import replace

from ..registry import backend_class
from ..scratch_estimates import Computation, working_bytes
from ..spec import EngineReport, EngineSpec
from .manifest import Manifest

FIXED = 8 << 20  # what the library's matrix products ask for whatever their size


def with_estimates(manifest: Manifest) -> Manifest:
    """The manifest with an estimate for every report that is missing; unchanged where engines allocate themselves."""
    if backend_class(manifest.backend).allocates(manifest.target):
        return manifest
    computation = _computation(manifest)
    engines = {name: _estimated(spec, computation) for name, spec in manifest.engines.items()}
    return replace(manifest, engines=engines)


def _estimated(spec: EngineSpec, computation: Computation) -> EngineSpec:
    if spec.report.kernels or spec.report.scratch_bytes:
        return spec
    return replace(spec, report=EngineReport(scratch_bytes=FIXED + working_bytes(spec, computation)))


def library_bytes(manifest: Manifest) -> int:
    """What the library allocates beside weights and arena (`Backend.library_bytes`)."""
    engines = tuple(manifest.engines.values())
    return backend_class(manifest.backend).library_bytes(engines, _computation(manifest), manifest.target)


def packed_bytes(manifest: Manifest) -> int:
    """What the library takes for packed matrices besides, where there is room (`Backend.packed_bytes`)."""
    engines = tuple(manifest.engines.values())
    return backend_class(manifest.backend).packed_bytes(engines, _computation(manifest), manifest.target)


def _computation(manifest: Manifest) -> Computation:
    channels = tuple(manifest.image_tokenizer.level_channels)
    return Computation(manifest.precision, channels, manifest.plan.depth)
