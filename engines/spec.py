"""Engines as they are described: tensors at the border, the compiler's report, weights and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field

LAYER = "{layer}"  # in the names of weights: the layer that an engine is run for


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. `dtype` is a numpy name ("bfloat16" besides)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineReport:
    """What a compiler said of an engine it built. Kernels are 0 where a backend does not say.

    `scratch_bytes` is the device memory the engine uses while it runs, shared with other engines;
    `fused_attentions` counts attentions that became one kernel each.
    """

    scratch_bytes: int = 0
    kernels: int = 0
    fused_attentions: int = 0


@dataclass(frozen=True)
class EngineSpec:
    """One engine file and how to bind it.

    `weights` maps an input to the name of a tensor in weights.safetensors; "{layer}" in it stands for the
    layer the engine is run for: the number of a transformer's, the key of an image decoder's. Inputs not in `weights`
    are activations. `attentions` counts those that the graph holds and that a compiler of GPU engines must fuse.
    """

    name: str
    file: str  # relative to the bundle
    sha256: str
    size_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: dict[str, str]
    backend: str
    target: str
    library_version: str
    attentions: int = 0
    report: EngineReport = field(default_factory=EngineReport)

    def tensor(self, name: str) -> TensorSpec:
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise KeyError(name)
