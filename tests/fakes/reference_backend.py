"""A whole backend in one screen: the reference evaluator of the package onnx, every operator in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastvar.core.platform import import_extra
from fastvar.core.precision import Precision
from fastvar.core.tensors import Launch, Scratch, TensorRef
from fastvar.engines.base import Backend, CompiledEngine, Engine, check_bindings, check_border
from fastvar.engines.device import Device, HostDevice, host_array
from fastvar.engines.onnx_graph import clean_graph
from fastvar.engines.spec import EngineSpec, TensorSpec
from fastvar.errors import BuildError

TARGET = "cpu"


class ReferenceBackend(Backend):
    """Slow, and right: what it draws, other backends are to draw."""

    name = "reference"
    suffix: ClassVar[str] = ".onnx"
    extra: ClassVar[str] = "export"
    distributions: ClassVar[tuple[tuple[str, ...], ...]] = (("onnx",),)
    summary: ClassVar[str] = "builds and runs on any CPU, slowly"
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    device_targets: ClassVar[Mapping[str, str]] = {"cpu": TARGET}
    native_code: ClassVar[bool] = False

    def __init__(self) -> None:
        self._onnx = import_extra("onnx", "export")
        self._reference = import_extra("onnx.reference", "export")

    @classmethod
    def runs_on_host(cls, target: str) -> bool:
        return True

    def version(self) -> str:
        return str(self._onnx.__version__)

    def resolve_target(self, target: str | None, precision: Precision) -> str:
        self.check_precision(precision)
        if target not in (None, TARGET):
            raise BuildError(f"{self.name} does not build for target {target!r}", expected=f"target {TARGET!r}")
        return TARGET

    def build(self, graph: bytes, target: str) -> CompiledEngine:
        return CompiledEngine(clean_graph(graph))

    def device(self) -> Device:
        return HostDevice()

    def load(self, engine: bytes, spec: EngineSpec) -> ReferenceEngine:
        self.check(spec)
        model = self._onnx.load_model_from_string(engine)
        border = (self._specs(model.graph.input), self._specs(model.graph.output))
        check_border(spec, *border)
        return ReferenceEngine(self._reference.ReferenceEvaluator(model), spec.name, *border)

    def _specs(self, values: Any) -> tuple[TensorSpec, ...]:
        numpy_type = self._onnx.helper.tensor_dtype_to_np_dtype
        tensors = [(value.name, value.type.tensor_type) for value in values]
        return tuple(
            TensorSpec(name, str(numpy_type(tensor.elem_type)), tuple(dim.dim_value for dim in tensor.shape.dim))
            for name, tensor in tensors
        )


class ReferenceEngine(Engine):
    """One graph; every launch reads and writes the arrays that lie over the memory it was given."""

    def __init__(
        self, evaluator: Any, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self._evaluator, self.name, self.inputs, self.outputs = evaluator, name, inputs, outputs

    def prepare(self, tensors: Mapping[str, TensorRef], scratch: Scratch | None = None) -> Launch:
        check_bindings(self.name, tensors, self.inputs, self.outputs)
        given = {spec.name: host_array(tensors[spec.name]) for spec in self.inputs}
        written = {spec.name: host_array(tensors[spec.name]) for spec in self.outputs}

        def launch() -> None:
            for array, values in zip(written.values(), self._evaluator.run(list(written), given), strict=True):
                array[...] = values

        return launch
