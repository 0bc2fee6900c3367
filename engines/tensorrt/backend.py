"""TensorRT engines, over two libraries: TensorRT-RTX builds on any machine for RTX GPUs; TensorRT builds on the GPU
that the engine is for.

An engine file is the library's plan, packed with xz: most of a plan is kernel source that repeats. Engines are run by
runtime.py.
"""

from __future__ import annotations

import lzma
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ...core.platform import import_extra
from ...core.precision import Precision
from ...errors import BackendError, BuildError, BundleError
from ..base import Backend, CompiledEngine
from ..cache.engine_cache import default_folder, read_shared, save_shared
from ..onnx_graph import check_static, clean_graph
from ..spec import EngineSpec
from ..unpacking import UnpackingError, unpack_xz
from .build_log import BuildLog, listening_logger
from .cuda_device import CudaDevice
from .runtime import EngineLoader, TrtEngine

CURRENT, ANY = "current", "any"
TORCH_TENSORRT = "torch-tensorrt"  # Torch-TensorRT converts a traced step, without a graph in between
SM80, SM89 = 80, 89
PACKING = 1  # xz preset: 2 MiB become 30 KiB in 15 ms, and higher presets gain a tenth for ten times the time


def packed(plan: Any) -> bytes:
    """A serialized plan as engine files hold it: compressed with xz."""
    return lzma.compress(bytes(plan), preset=PACKING)


class TensorRTBackend(Backend):
    """The part that both libraries share.

    Args:
        cache_folder: keeps kernels compiled on the GPU (TensorRT-RTX) or timings (TensorRT) from run to run.

    Raises:
        BackendError: the library is not installed.
    """

    suffix: ClassVar[str] = ".engine.xz"
    precisions: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    address_alignment: ClassVar[int] = 256  # as the library documents set_tensor_address
    device_targets: ClassVar[Mapping[str, str]] = {"cuda": CURRENT}
    module: ClassVar[str]
    needs_cuda: ClassVar[tuple[int, int]]

    def __init__(self, cache_folder: Path | None = None) -> None:
        self._trt = import_extra(self.module, self.extra)
        self._cache_folder = cache_folder
        self._device: CudaDevice | None = None
        self._loader: EngineLoader | None = None

    @classmethod
    def make(cls, threads: int | None, cache_folder: Path | None, target: str | None) -> TensorRTBackend:
        return cls(cache_folder)

    def version(self) -> str:
        found = getattr(self._trt, "__version__", None)
        if found is None:
            raise BackendError(
                f"{self.module} is an empty folder of that name, left by its stubs or by another version",
                fix=f'pip install "fastvar-runtime[{self.extra}]"',
            )
        return str(found)

    def build(self, graph: bytes, target: str) -> CompiledEngine:
        trt, log = self._trt, BuildLog()
        logger = listening_logger(trt, log)
        builder = trt.Builder(logger)
        # TensorRT 11 knows no other kind of network, and may do without the flag.
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        self._parse(trt.OnnxParser(network, logger), clean_graph(graph), log)
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            check_static(tensor.name, tuple(tensor.shape))
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the report is read from it
        config.max_aux_streams = 0  # a step is recorded from one stream, which orders all launches
        config.clear_flag(trt.BuilderFlag.TF32)  # selection scores and sampling need all digits of fp32
        self._set_target(config, target)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"{self.name} {self.version()} cannot build the graph: {log.reason()}")
        self._built(config, target)
        return CompiledEngine(packed(plan), log.report())

    def device(self) -> CudaDevice:
        if self._device is None:
            self._device = CudaDevice(self.needs_cuda)
        return self._device

    def check(self, spec: EngineSpec) -> None:
        super().check(spec)
        facts = self.device().gpu_facts()
        targets = spec.target.split(",")
        if facts.capability not in targets and ANY not in targets:
            raise BackendError(
                f"engine {spec.name!r} was built for {spec.target}, this GPU is {facts.capability} ({facts.name})",
                expected=f"one of {', '.join(targets)}",
                fix=f"rebuild the bundle with --target {facts.capability}",
            )

    def load(self, engine: bytes, spec: EngineSpec) -> TrtEngine:
        self.check(spec)
        if self._loader is None:
            stamp = f"{self.name}-{self.version()}"
            self._loader = EngineLoader(self._trt, self.device(), self._cache_folder, stamp)
        try:
            plan = unpack_xz(engine)
        except UnpackingError as error:
            raise BundleError(
                f"engine {spec.name!r} cannot be unpacked with xz: {error}", fix="rebuild the bundle"
            ) from error
        return self._loader.load(plan, spec)

    def save_compiled_kernels(self) -> None:
        if self._loader is not None:
            self._loader.save_kernels()

    def _parse(self, parser: Any, graph: bytes, log: BuildLog) -> None:
        if parser.parse(graph):
            return
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        if not errors:
            raise BuildError(f"{self.name} {self.version()} rejects the graph: {log.reason()}")
        first = errors[0]
        where = f"node {first.node_name()} ({first.node_operator()})" if first.node_name() else "the graph"
        said = first.desc()
        reason = first.code().name if said in ("", "false") else said  # of unknown operators it says only "false"
        raise BuildError(f"{self.name} {self.version()} rejects {where}: {reason}")

    @abstractmethod
    def _set_target(self, config: Any, target: str) -> None: ...

    def _built(self, config: Any, target: str) -> None:
        """Keep what the library learned in a build."""


class TensorRTRTXBackend(TensorRTBackend):
    """TensorRT-RTX: compiles for a list of GPUs on any machine; the kernels are finished on the GPU."""

    name = "tensorrt-rtx"
    distributions: ClassVar[tuple[tuple[str, ...], ...]] = (("tensorrt-rtx-cu13",), ("cuda-python",))
    summary: ClassVar[str] = "builds on any machine for RTX GPUs; runs with an NVIDIA driver for CUDA 13"
    module: ClassVar[str] = "tensorrt_rtx"
    extra: ClassVar[str] = "tensorrt-rtx"
    needs_cuda: ClassVar[tuple[int, int]] = (13, 0)

    def resolve_target(self, target: str | None, precision: Precision) -> str:
        """The GPUs that one engine serves: "sm86,sm89" say, "current" for this machine's, "any" for sm80 and newer."""
        self.check_precision(precision)
        names = [name.strip().lower() for name in (target or CURRENT).split(",")]
        if names == [CURRENT]:
            names = [self._current()]
        if names != [ANY]:
            self._check_names(names)
            names = sorted(set(names), key=_capability)
        for name in names:
            _check_capability(name, precision)
        return ",".join(names)

    def _current(self) -> str:
        try:
            return self.device().gpu_facts().capability
        except BackendError as error:
            raise BuildError(
                f"target {CURRENT!r} means the GPU in this machine: {error.problem}",
                expected=f"a GPU, or its name: {', '.join(self.known_targets())}",
                fix="give --target, sm86 for an RTX 3090 say",
            ) from error

    def known_targets(self) -> list[str]:
        """GPU generations that the library builds the graphs for: on Turing it has no fp32 matrix product."""
        names = (n.lower() for n in dir(self._trt.ComputeCapability) if n.startswith("SM") and n[2:].isdigit())
        return sorted((name for name in names if _capability(name) >= SM80), key=_capability)

    def _check_names(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self.known_targets()]
        if unknown:
            raise BuildError(
                f"{self.name} {self.version()} builds for no GPU {unknown[0]!r}",
                expected=f"a list of {', '.join(self.known_targets())}, or {CURRENT}, or {ANY}",
                fix=f"--target {ANY} marks the engine for everything from sm80 on, without a promise that it runs",
            )

    def _set_target(self, config: Any, target: str) -> None:
        if target == ANY:
            return  # left unset, the library marks everything from SM80 on
        names = target.split(",")
        config.num_compute_capabilities = len(names)
        for position, name in enumerate(names):
            config.set_compute_capability(getattr(self._trt.ComputeCapability, name.upper()), position)


class TensorRTDatacentreBackend(TensorRTBackend):
    """TensorRT: compiles, and times kernels, on the GPU that the engine is for."""

    name = "tensorrt"
    distributions: ClassVar[tuple[tuple[str, ...], ...]] = (("tensorrt",), ("cuda-python",))
    summary: ClassVar[str] = "builds and runs on the GPU that the engines are for"
    conversions: ClassVar[tuple[str, ...]] = (TORCH_TENSORRT,)
    module: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "tensorrt"
    needs_cuda: ClassVar[tuple[int, int]] = (12, 0)

    def resolve_target(self, target: str | None, precision: Precision) -> str:
        self.check_precision(precision)
        found = self.device().gpu_facts().capability
        if target not in (None, CURRENT, found):
            raise BuildError(
                f"{self.name} builds on the GPU that the engine is for: this one is {found}, not {target}",
                expected=f"target {CURRENT} or {found}",
                fix="build on that GPU, or with --backend tensorrt-rtx on any machine",
            )
        _check_capability(found, precision)
        return found

    def _set_target(self, config: Any, target: str) -> None:
        blob = read_shared(self._timings(target))
        config.set_timing_cache(config.create_timing_cache(blob), False)

    def _built(self, config: Any, target: str) -> None:
        save_shared(self._timings(target), bytes(config.get_timing_cache().serialize()))

    def _timings(self, target: str) -> Path:
        return (self._cache_folder or default_folder()) / f"{self.name}-{self.version()}-{target}.timings"


def _capability(name: str) -> int:
    return int(name[2:])


def _check_capability(name: str, precision: Precision) -> None:
    """Refuse a GPU generation without the instructions that a precision needs."""
    capability = SM80 if name == ANY else _capability(name)
    if capability < SM80 and precision.compute == "bfloat16":
        raise BuildError(f"{name} has no bfloat16", expected="sm80 or newer", fix="build with --precision fp16")
    if capability < SM89 and precision.weights == "float8_e4m3fn":
        raise BuildError(
            f"{name} has no fp8: --weights fp8 needs an Ada, Hopper or Blackwell GPU",
            expected="sm89 or newer in every --target",
            fix="build with --weights int8, which every GPU here has",
        )
