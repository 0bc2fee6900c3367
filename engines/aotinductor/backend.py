"""AOTInductor: step programs compiled ahead of time by torch, for CPUs and for NVIDIA GPUs.

The one backend that needs torch where it runs. An engine is a shared library (engine_file.py). It holds no weights:
they come as arguments, and so does the memory of its results.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ...core.dtypes import storage_dtype
from ...core.platform import cpu_identity, import_extra, usable_cores
from ...core.precision import WEIGHT_FORMATS, Precision, PrecisionChoice, parse_precision
from ...core.tensors import Launch, Scratch, TensorRef
from ...errors import BackendError, BuildError
from ..base import PROGRAM, Backend, CompiledEngine, Engine, check_bindings
from ..cache.engine_cache import default_folder
from ..cache.lock import FolderLock
from ..cache.product_speeds import fastest, kept_speeds
from ..device import Device, HostDevice, host_array
from ..scratch_estimates import Computation, working_bytes
from ..spec import EngineSpec
from ..unpacking import MOST_BYTES
from . import stand_in_gpu
from .convolutions import (
    scratch_bytes,
    use_row_statistics,
    use_small_enlargements,
    use_winograd,
    use_winograd_residuals,
)
from .cuda_device import TorchCudaDevice
from .engine_file import ProgramFile
from .gpu_program import arrays_declared_alike, forget_kernels, gpu_options, moved_to_gpu, with_attention
from .gpus import ATTENTIONS, CUDA, GPUS, GpuTarget, capability_here, is_gpu, require_gpu
from .graph import tidy
from .native import inductor_options, kernel_digest
from .operators import ATTENTION, LINEAR, LINEAR_INT8, WINOGRAD, register
from .packed_weights import PackedWeights, packed_bytes
from .passes import linear_weights, use_attention_kernel, use_int8_gelu, use_onednn_linear
from .product_speed import product_speeds
from .targets import (
    CPU,
    WITH_INT8_PRODUCTS,
    WITH_KERNEL,
    accurate_types,
    best_cpu,
    check_cpu,
    compiler_options,
    onednn_types,
    require_cpu_options,
)

GPU_BYTES = 64 << 20  # workspaces of cuBLAS and cuDNN
HOST_BYTES = 230 << 20  # torch's code, and the compiled libraries, of which there are about a dozen


class AotInductorBackend(Backend):
    """Programs through AOTInductor.

    Args:
        threads: CPU threads of torch, for the whole process; by default torch's choice, one per usable core at most.
        target: "cuda" for the GPU in this machine, "cuda-sm90" say for one by name; the CPU by default.

    Raises:
        BackendError: torch is not installed.
    """

    name = "aotinductor"
    extra: ClassVar[str] = "aotinductor"
    distributions: ClassVar[tuple[tuple[str, ...], ...]] = (("torch",),)
    summary: ClassVar[str] = (
        "builds with a C++ compiler, for GPUs that are elsewhere on Linux; runs where torch of the same version is"
    )
    device_targets: ClassVar[Mapping[str, str]] = {"cpu": CPU, "cuda": CUDA}
    address_alignment: ClassVar[int] = 16  # on a GPU it works on a copy of what is not, and results in it are lost
    suffix: ClassVar[str] = ".program"
    precisions: ClassVar[tuple[str, ...]] = ("bfloat16", "float32", "float16")
    quantises_activations: ClassVar[bool] = True
    graph_form: ClassVar[str] = PROGRAM

    def __init__(self, threads: int | None = None, target: str | None = None) -> None:
        if threads is not None and threads < 1:
            raise BackendError(f"{threads} threads", expected="at least 1")
        self._torch = import_extra("torch", "aotinductor")
        self._target = target or CPU
        self._on_host = self.runs_on_host(self._target)
        self._device: Device | None = None
        self._libraries: dict[str, Library] = {}
        self._packed: PackedWeights | None = PackedWeights(self._torch)
        # torch counts the cores of the machine, not the quota of a container.
        self._torch.set_num_threads(threads or min(self._torch.get_num_threads(), usable_cores()))

    @classmethod
    def make(cls, threads: int | None, cache_folder: Path | None, target: str | None) -> AotInductorBackend:
        return cls(threads, target)

    @classmethod
    def allocates(cls, target: str) -> bool:
        return True

    @classmethod
    def library_bytes(cls, engines: Sequence[EngineSpec], computation: Computation, target: str) -> int:
        own = HOST_BYTES if cls.runs_on_host(target) else GPU_BYTES
        if target in WITH_INT8_PRODUCTS and computation.precision.compute in WINOGRAD.types:
            element = storage_dtype(computation.precision.compute).itemsize
            own += scratch_bytes(max(computation.level_channels), element, usable_cores())
        return own + max(working_bytes(spec, computation) for spec in engines)

    @classmethod
    def packed_bytes(cls, engines: Sequence[EngineSpec], computation: Computation, target: str) -> int:
        compute, on_host = computation.precision.compute, cls.runs_on_host(target)
        return packed_bytes(engines, compute, computation.layers) if on_host and compute in onednn_types(target) else 0

    def pack_weights(self, wanted: bool) -> None:
        self._packed = PackedWeights(self._torch) if wanted else None

    @classmethod
    def runs_on_host(cls, target: str) -> bool:
        return not is_gpu(target)

    def auto_precision(self, kept: Path | None, *, anew: bool = False) -> tuple[str, PrecisionChoice]:
        """bfloat16 on GPUs; on CPUs what this one was measured to be fastest in, of what the target has products in."""
        if not self._on_host:
            return "bfloat16", PrecisionChoice(False, "what GPUs multiply fast, with the range of fp32")
        here = best_cpu(self._torch)
        target = here if self._target == CPU else self._target
        finest, *others = types = accurate_types(target)
        reason = "nothing was measured to be clearly faster" if others else f"{target} has no products of 16 bits"
        if target != here and not others:
            return finest, PrecisionChoice(False, reason)
        found = product_speeds(self._torch, kept, accurate_types(here), anew=anew)
        best = fastest(found.gflops, types)
        if best != finest:
            reason = "measured to be clearly the fastest"
        return best, PrecisionChoice(False, reason, found.cpu, f"torch {found.torch}", found.gflops)

    @classmethod
    def planned_precision(cls, compute: str | None, weights: str | None, target: str | None) -> Precision:
        quantised = WEIGHT_FORMATS.get(weights or "", ("", ""))[1]
        kept = kept_speeds(default_folder(), cpu_identity()) if cls.runs_on_host(target or CPU) else None
        measured = kept is not None and not quantised and target in (None, CPU)
        return parse_precision(compute, weights, default=kept.compute if kept and measured else cls.precisions[0])

    def version(self) -> str:
        return str(self._torch.__version__)

    def stamp(self) -> str:
        """torch, what is done to programs on their way to it, our kernels, and whether a GPU tried kernels out."""
        tried = "" if self._on_host else "tried out" if self._tries_kernels else "by name"
        return f"{super().stamp()} {kernel_digest()} {tried}".rstrip()

    def resolve_target(self, target: str | None, precision: Precision) -> str:
        self.check_precision(precision)
        if self._on_host:
            require_cpu_options(self._torch)
            if precision.weights not in ("", "int8"):
                raise BuildError("fp8 weights are for GPUs", expected="--weights int8 on a CPU")
            found = best_cpu(self._torch) if target in (None, CPU) else check_cpu(self._torch, str(target))
            if precision.activations and found not in WITH_INT8_PRODUCTS:
                raise BuildError(
                    f"{found} has no instructions for --weights w8a8",
                    expected=f"one of {', '.join(WITH_INT8_PRODUCTS)}",
                    fix="build with --weights int8",
                )
            return found
        if precision.activations:
            raise BuildError("--weights w8a8 is for CPUs", expected="--weights int8 or fp8 on a GPU")
        wanted, here = GpuTarget.parse(target or CUDA), capability_here(self._torch)
        if not wanted.capability and here not in GPUS:
            raise BuildError(
                f"target {wanted} means the GPU in this machine: "
                + (f"{here} is not known" if here else "there is none"),
                expected=f"a GPU, or its generation: {', '.join(f'{CUDA}-{name}' for name in GPUS)}",
                fix=f"give --target, {CUDA}-sm86 for an RTX 3090 say",
            )
        return str(replace(wanted, capability=wanted.capability or here))

    @classmethod
    def with_attention(cls, target: str | None, kernel: str) -> str:
        if kernel not in ATTENTIONS or cls.runs_on_host(target or CPU):
            raise BuildError(
                f"attention {kernel!r} for {target or CPU}",
                expected=f"{' or '.join(ATTENTIONS)}, with --target cuda or cuda-sm90 say",
            )
        return str(replace(GpuTarget.parse(target or CUDA), attention=kernel))

    def build_environment(self, target: str) -> dict[str, str]:
        """A GPU that is named is stood in for, even by the one at hand: its kernels are chosen alike on every machine.

        "cuda" alone means the GPU in this machine, and kernels are tried out on it.
        """
        if self.runs_on_host(target) or self._tries_kernels:
            return {}
        return stand_in_gpu.environment(self._torch, GpuTarget.parse(target).capability)

    @property
    def _tries_kernels(self) -> bool:
        return not self._on_host and not GpuTarget.parse(self._target).capability

    def check(self, spec: EngineSpec) -> None:
        super().check(spec)
        if self._on_host:
            check_cpu(self._torch, spec.target, f"engine {spec.name!r} was built")
            return
        here = require_gpu(self._torch)
        if GpuTarget.parse(spec.target).capability != here:
            raise BackendError(
                f"engine {spec.name!r} was built for {spec.target}, this GPU is {CUDA}-{here}",
                fix=f"rebuild the bundle with --target {CUDA}-{here}",
            )

    def build(self, graph: bytes, target: str) -> CompiledEngine:
        """A program as torch.export saves it -> engine.

        Raises:
            BuildError: not such a program, no C++ compiler, or the compiler rejects what was made of it.
        """
        torch = self._torch
        register(LINEAR_INT8)  # programs may call it as they are traced
        try:
            program = torch.export.load(io.BytesIO(graph))
        except (RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise BuildError(f"not a program that torch {self.version()} reads: {error}") from error
        inductor = import_extra("torch._inductor", "aotinductor")
        kernels: AbstractContextManager[Any] = nullcontext()
        weights: tuple[int, ...] = ()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch warns of its own deprecations
            path = Path(folder) / "engine.pt2"
            try:
                if self.runs_on_host(target):
                    options = _prepared(torch, program, target)
                    weights = linear_weights(program)
                else:  # it was traced on the CPU
                    program = moved_to_gpu(torch, program, f"{CUDA}:{torch.cuda.current_device()}")
                    options, kernels = gpu_options(torch), with_attention(torch, GpuTarget.parse(target).attention)
                    forget_kernels()
                with kernels, arrays_declared_alike(torch), _folder_of_its_own(program, target):
                    inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
            except BuildError:
                raise
            except Exception as error:  # a compiler's errors share no other base
                raise BuildError(
                    f"{self.name} (torch {self.version()}) cannot compile the program: {_first_lines(error)}",
                    fix="fastvar doctor says whether there is a C++ compiler",
                ) from error
            return CompiledEngine(ProgramFile.of(_library(path), linear_weights=weights).to_bytes())

    def device(self) -> Device:
        if self._device is None:
            self._device = HostDevice() if self._on_host else TorchCudaDevice(self._torch)
        return self._device

    def load(self, engine: bytes, spec: EngineSpec) -> AotEngine:
        self.check(spec)
        file = ProgramFile.from_bytes(engine)
        device = self.device()
        constants = [self._torch.from_numpy(constant).to(device.name) for constant in file.constants.values()]
        library, packs = self._library(file, spec.name), file.packable(spec) if self._on_host else frozenset()
        return AotEngine(self._torch, library, constants, spec, device, self._packed, packs)

    def _library(self, file: ProgramFile, name: str) -> Library:
        """Loaded once for all the engines that share it."""
        digest = hashlib.sha256(file.packed).hexdigest()
        if digest not in self._libraries:
            with tempfile.TemporaryDirectory() as folder:  # the loader has it open before the folder goes
                path = Path(folder) / "engine.so"
                path.write_bytes(file.library)
                try:
                    self._libraries[digest] = Library(self._runner(str(path)))
                except RuntimeError as error:
                    raise BackendError(
                        f"torch {self.version()} cannot load engine {name!r}: {_first_lines(error)}",
                        fix="rebuild the bundle",
                    ) from error
        return self._libraries[digest]

    def _runner(self, path: str) -> Any:
        runners = self._torch._C._aoti
        if self._on_host:
            return runners.AOTIModelContainerRunnerCpu(path, 1)
        # Run by one thread at a time (`Library.turn`): else every run asks an event of the run before it, which a
        # capture refuses, and which waits for the GPU outside of one.
        return runners.AOTIModelContainerRunnerCuda(path, 1, CUDA, "", True)


@contextmanager
def _folder_of_its_own(program: Any, target: str) -> Iterator[None]:
    """Where the compiler leaves its files while it compiles a program; nobody else writes there meanwhile.

    Its own choice is a name by the program's source, in which sizes do not stand: programs that differ in nothing else,
    compiled at the same time, would find each other's files, and a library could be linked with another's kernels.
    The name is the same in every build, for it comes into the library.
    """
    config = import_extra("torch._inductor.config", "aotinductor")
    cache = import_extra("torch._inductor.codecache", "aotinductor")
    given = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    sizes = [(str(getattr(value, "dtype", "")), str(tuple(getattr(value, "shape", ())))) for value in given]
    made_of = f"{target} {sizes} {program.graph_module.code}"
    name = f"fastvar-{hashlib.sha256(made_of.encode()).hexdigest()[:40]}"
    folder = Path(cache.cache_dir()) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    lock.acquire(wait=True)
    try:
        with config.patch({"aot_inductor.output_path": name}):
            yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Library:
    """One loaded library; launches of several threads wait for each other."""

    runner: Any
    turn: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class AotEngine(Engine):
    """A library with the constants of one step; `packs` are the inputs that may be given in oneDNN's order."""

    torch: Any
    library: Library
    constants: list[Any]
    spec: EngineSpec
    device: Device
    packed: PackedWeights | None = None
    packs: AbstractSet[str] = frozenset()

    def prepare(self, tensors: Mapping[str, TensorRef], scratch: Scratch | None = None) -> Launch:
        spec = self.spec
        check_bindings(spec.name, tensors, spec.inputs, spec.outputs)
        bound = [*self.constants, *(self._given(t.name, tensors[t.name]) for t in (*spec.inputs, *spec.outputs))]
        runner, turn = self.library.runner, self.library.turn
        stream = self.device.stream if isinstance(self.device, TorchCudaDevice) else nullcontext

        def launch() -> None:
            try:
                with turn, stream():
                    runner.run(bound)
            except RuntimeError as error:
                raise BackendError(
                    f"AOTInductor failed while running engine {spec.name!r}: {_first_lines(error)}"
                ) from error

        return launch

    def _given(self, name: str, ref: TensorRef) -> Any:
        tensor = self._tensor(ref)
        return self.packed.of(ref, tensor) if self.packed and name in self.packs else tensor

    def _tensor(self, ref: TensorRef) -> Any:
        """A torch tensor on memory that is there; whoever prepared the launch keeps it alive."""
        if isinstance(self.device, TorchCudaDevice):
            return self.device.tensor(ref)
        flat = self.torch.from_numpy(host_array(ref).reshape(-1).view("uint8"))
        return flat.view(getattr(self.torch, ref.dtype)).view(ref.shape)


def _prepared(torch: Any, program: Any, target: str) -> dict[str, Any]:
    """A program made ready for a CPU; what the compiler is to be told of it."""
    tidy(torch, program)
    use_row_statistics(torch, program)
    winograd = target in WITH_INT8_PRODUCTS and use_winograd_residuals(torch, program) + use_winograd(torch, program)
    use_small_enlargements(torch, program)
    replaced = {
        WINOGRAD: winograd,
        LINEAR_INT8: use_int8_gelu(torch, program),
        LINEAR: use_onednn_linear(torch, program, onednn_types(target)),
        ATTENTION: target == WITH_KERNEL and use_attention_kernel(torch, program),
    }
    operators = {register(operator): operator.declaration for operator, count in replaced.items() if count}
    return compiler_options(target) | (inductor_options(operators) if operators else {})


def _library(package: Path) -> bytes:
    """The shared library out of a package: its sources, which lie beside it, are not needed."""
    with zipfile.ZipFile(package) as archive:
        (found,) = (info for info in archive.infolist() if info.filename.endswith(".so"))
        if found.file_size > MOST_BYTES:  # the archive reads no more than it declares
            raise BuildError(f"the compiled program has {found.file_size} bytes", expected=f"at most {MOST_BYTES}")
        return archive.read(found)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:3])
