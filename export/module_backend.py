"""Step modules run as they are, in torch on the CPU, in place of the engines compiled from them.

No library here runs bfloat16 graphs without a GPU. With this backend a bundle built for one draws on the CPU, from
its own weights and manifest, in its own precision: what is not checked then is only the compiler's work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.precision import Precision
from ..core.tensors import Launch, Scratch, TensorRef
from ..engines.base import Backend, CompiledEngine, Engine, check_bindings
from ..engines.bundle.manifest import Manifest
from ..engines.device import Device, HostDevice, host_array
from ..engines.spec import EngineSpec
from ..errors import BuildError
from .assembly import assemble
from .models.common.quantise import SCALE, IntegerFactor, dequantise, integer_linear
from .models.common.step_graph import StepGraph

_BITS = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}  # types that numpy holds as bare bits


class ModuleBackend(Backend):
    """Loads engines of any backend as the modules of the same name. `text_encoder` is the T5 configuration, if any."""

    name = "modules"
    suffix: ClassVar[str] = ".module"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    def __init__(self, manifest: Manifest, text_encoder: Any = None) -> None:
        self._precision = manifest.precision
        self._graphs: dict[str, StepGraph] = assemble(
            manifest.plan,
            manifest.transformer,
            manifest.image_tokenizer,
            text_encoder,
            manifest.text_length,
            [found.batch for found in manifest.sets],
            decoder_tile=manifest.tiles.rows if manifest.tiles else None,
            with_encoder=bool(manifest.encoder),
        ).graphs

    def version(self) -> str:
        return torch.__version__

    def check(self, spec: EngineSpec) -> None:
        """Whatever compiled the engine: only its name and its border are used."""

    def resolve_target(self, target: str | None, precision: Precision) -> str:
        raise BuildError("step modules are not compiled", expected="a backend that builds engines")

    def build(self, graph: bytes, target: str) -> CompiledEngine:
        raise BuildError("step modules are not compiled", expected="a backend that builds engines")

    def device(self) -> Device:
        return HostDevice()

    def load(self, engine: bytes, spec: EngineSpec) -> Engine:
        graph = self._graphs[spec.name]
        return ModuleEngine(graph.factory(**graph.arguments), spec, self._precision)


class ModuleEngine(Engine):
    """One module on given memory."""

    def __init__(self, module: Any, spec: EngineSpec, precision: Precision) -> None:
        self._module, self._spec, self._precision = module.eval(), spec, precision

    def prepare(self, tensors: Mapping[str, TensorRef], scratch: Scratch | None = None) -> Launch:
        check_bindings(self._spec.name, tensors, self._spec.inputs, self._spec.outputs)
        module = self._module
        bound = {name: _tensor(ref) for name, ref in tensors.items()}
        weights = {name: _weight(bound, name, self._precision) for name in module.weights}
        inputs, outputs = [bound[name] for name in module.inputs], [bound[name] for name in module.outputs]

        def launch() -> None:
            with torch.no_grad():
                results = module(*inputs, weights={name: make() for name, make in weights.items()})
            for output, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=True):
                output.copy_(result)

        return launch


def _weight(bound: Mapping[str, Tensor], name: str, precision: Precision) -> Callable[[], Tensor | IntegerFactor]:
    """A weight as the module takes it; a quantised one is never held whole in two forms."""
    stored, scale = bound[name], bound.get(name + SCALE)
    if scale is None:
        return lambda: stored
    if precision.activations:
        return lambda: IntegerFactor(stored, scale, integer_linear)
    return lambda: dequantise(stored, scale)


def _tensor(ref: TensorRef) -> Tensor:
    array = torch.from_numpy(host_array(ref))
    return array.view(_BITS[ref.dtype]) if ref.dtype in _BITS else array
