"""What a backend is. Invariants:

* an engine holds no transformer weights: they are inputs, bound by address, layer after layer;
* shapes are static, so a call is prepared once (`prepare`) and then only launched;
* a prepared launch reads and writes the memory it was given, its scratch included, and allocates none that
  outlives it;
* launches of one device run in the order they were made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..core.precision import AUTO, WEIGHT_FORMATS, Precision, PrecisionChoice, parse_precision
from ..core.provenance import source_digest
from ..core.tensors import Launch, Scratch, TensorRef
from ..errors import BackendError, BuildError, BundleError, InternalError
from .registry import BACKEND_NAMES, backend_class
from .spec import EngineReport, EngineSpec, TensorSpec

if TYPE_CHECKING:
    from .device import Device
    from .scratch_estimates import Computation

ONNX, PROGRAM = "onnx", "program"  # forms of a step graph: ONNX bytes, or an exported torch program's


@dataclass(frozen=True)
class CompiledEngine:
    """Engine bytes, and what the compiler said of them."""

    engine: bytes
    report: EngineReport = field(default_factory=EngineReport)


class Engine(ABC):
    """A loaded engine; safe to launch from several threads on different memory."""

    scratch_bytes: int = 0  # what `prepare` wants to be given

    @abstractmethod
    def prepare(self, tensors: Mapping[str, TensorRef], scratch: Scratch | None = None) -> Launch:
        """Bind every input and output by name.

        Raises:
            InternalError: a name is missing, or shape or dtype differ from the engine's.
        """


class Backend(ABC):
    """Turns step graphs into engines, and loads them."""

    name: str
    suffix: ClassVar[str]  # of engine files
    precisions: ClassVar[tuple[str, ...]]  # element types it computes in, the default first
    quantises_activations: ClassVar[bool] = False  # for products of integers: `Precision.activations`
    graph_form: ClassVar[str] = ONNX  # of the graphs that it builds engines from
    extra: ClassVar[str]  # of fastvar-runtime: what to install
    distributions: ClassVar[tuple[tuple[str, ...], ...]]  # packages it needs, by the names they are installed under
    summary: ClassVar[str]  # where it builds and where its engines run, in one line
    device_targets: ClassVar[Mapping[str, str]]  # "cpu", "cuda" -> the target that means this machine's own
    conversions: ClassVar[tuple[str, ...]] = ()  # ways from a step to an engine beside `graph_form`
    native_code: ClassVar[bool] = True  # loading an engine runs code that came with it
    address_alignment: ClassVar[int] = 1  # bytes that the address of every tensor must be a multiple of

    @classmethod
    def make(cls, threads: int | None, cache_folder: Path | None, target: str | None) -> Backend:
        """The backend with what concerns it of these, by default nothing (see registry.get_backend).

        Raises:
            BackendError: its library is not installed.
        """
        return cls()

    @abstractmethod
    def version(self) -> str:
        """Version of the library that builds and runs the engines.

        Raises:
            BackendError: the library is not installed.
        """

    def stamp(self) -> str:
        """What engines depend on beside graph and target: the library, and our source of what is done with it.

        Another stamp, another engine.
        """
        return f"{self.version()} {source_digest(type(self).__module__)}"

    @abstractmethod
    def resolve_target(self, target: str | None, precision: Precision) -> str:
        """The device to build for, in one spelling; the backend's default for None.

        Raises:
            BuildError: no such device, or one that lacks what the precision needs.
        """

    @classmethod
    def runs_on_host(cls, target: str) -> bool:
        """Whether engines for a target work on the host's memory, and take what they need there by themselves."""
        return False

    def keeps_threads_apart(self, threads: int) -> bool:
        """Whether several in one process, of at most so many threads each, run side by side on threads of their own."""
        return False

    @classmethod
    def allocates(cls, target: str) -> bool:
        """Whether engines allocate by themselves what they work in: no scratch memory is given to them."""
        return cls.runs_on_host(target)

    def pack_weights(self, wanted: bool) -> None:  # noqa: B027 most backends keep weights as they are given
        """At the beginning of a session: whether its engines may keep matrices in the library's own order besides.

        It takes `packed_bytes` of memory, and saves time.
        """

    @classmethod
    def packed_bytes(cls, engines: Sequence[EngineSpec], computation: Computation, target: str) -> int:
        """Host memory of matrices that `pack_weights` allows; 0 where the library packs none."""
        return 0

    @classmethod
    def library_bytes(cls, engines: Sequence[EngineSpec], computation: Computation, target: str) -> int:
        """What the library allocates beside weights and arena, estimated; 0 where it allocates nothing."""
        return 0

    def auto_precision(self, kept: Path | None, *, anew: bool = False) -> tuple[str, PrecisionChoice]:
        """Element type to compute in where nobody asks for one, and why; the first of `precisions` by default.

        Args:
            kept: the folder where measurements are kept; None to neither read nor keep any.
            anew: what is kept there is measured again.
        """
        return self.precisions[0], PrecisionChoice(False, f"{self.name} computes in it unless it is asked for another")

    def precision(
        self, compute: str | None, weights: str | None, kept: Path | None = None
    ) -> tuple[Precision, PrecisionChoice]:
        """From the command line's words; AUTO or None is what such weights go with, or `auto_precision`.

        Raises:
            PlanError: as `parse_precision`.
        """
        if compute not in (None, AUTO):
            return parse_precision(compute, weights), PrecisionChoice(True)
        if self.quantises_activations and WEIGHT_FORMATS.get(weights or "", ("", ""))[1]:
            return parse_precision(None, weights, default="bfloat16"), PrecisionChoice(False, f"{weights} goes with it")
        parse_precision(None, weights)  # a wrong word is told before anything is measured
        default, choice = self.auto_precision(kept)
        return parse_precision(None, weights, default=default), choice

    @classmethod
    def planned_precision(cls, compute: str | None, weights: str | None, target: str | None) -> Precision:
        """`precision` where the library need not be installed: of measurements, those that are kept count.

        Raises:
            PlanError: as `parse_precision`.
        """
        return parse_precision(compute, weights, default=cls.precisions[0])

    def accepts(self, library_version: str) -> bool:
        """Whether engines built with that library version run here: by default only with the very same one."""
        return library_version == self.version()

    def check(self, spec: EngineSpec) -> None:
        """Refuse an engine that does not run here, before the library sees its bytes; by default, `check_library`.

        Raises:
            BackendError: the engine cannot be loaded here.
        """
        self.check_library(spec)

    def check_library(self, spec: EngineSpec) -> None:
        """Refuse an engine of another backend or library version; the device for it need not be here.

        Raises:
            BackendError: it is one.
        """
        if spec.backend != self.name:
            raise BackendError(f"engine {spec.name!r} is for backend {spec.backend}", expected=f"backend {self.name}")
        if not self.accepts(spec.library_version):
            raise BackendError(
                f"engine {spec.name!r} was built with {self.name} {spec.library_version}, "
                f"version {self.version()} is installed",
                expected="a version that runs engines built by the other",
                fix=f"install {self.name} {spec.library_version}, or rebuild the bundle",
            )

    @classmethod
    def check_precision(cls, precision: Precision) -> None:
        """Refuse element types that the backend does not compute in.

        Raises:
            BuildError: not one of `precisions`, or quantised activations where it has none.
        """
        if precision.compute not in cls.precisions:
            raise BuildError(
                f"{cls.name} does not compute in {precision.compute}",
                expected=f"one of {', '.join(cls.precisions)}",
                fix="choose another --precision or another --backend",
            )
        if precision.activations and not cls.quantises_activations:
            raise BuildError(
                f"{cls.name} does not quantise activations",
                expected=f"--backend {' or '.join(_quantising())} for --weights w8a8",
                fix="build with --weights int8, which quantises the weights alone",
            )

    @abstractmethod
    def build(self, graph: bytes, target: str) -> CompiledEngine:
        """A graph in the backend's form -> engine for a target that `resolve_target` gave; deterministic.

        Raises:
            BuildError: the library rejects the graph; names the node.
        """

    @classmethod
    def with_attention(cls, target: str | None, kernel: str) -> str:
        """The target with a choice of attention kernel.

        Raises:
            BuildError: the backend offers no choice, or not that one.
        """
        raise BuildError(f"{cls.name} chooses the kernel of attention by itself", fix="leave --attention away")

    def build_environment(self, target: str) -> dict[str, str]:
        """Variables that a process needs to build for a target; where there are any, this process cannot build.

        Raises:
            BuildError: nothing on this machine builds for it.
        """
        return {}

    @abstractmethod
    def device(self) -> Device:
        """The device that this backend's engines run on.

        Raises:
            BackendError: it is not there, or its driver is too old.
        """

    @abstractmethod
    def load(self, engine: bytes, spec: EngineSpec) -> Engine:
        """Load engine bytes whose digest was checked before.

        Raises:
            BackendError: made by another library version, or for another device.
        """

    def save_compiled_kernels(self) -> None:  # noqa: B027 most backends keep nothing
        """Called when engines have run for the first time: keep what the library compiled for them."""


def _quantising() -> list[str]:
    return [name for name in BACKEND_NAMES if backend_class(name).quantises_activations]


def check_border(spec: EngineSpec, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """A loaded engine takes and gives what its manifest says.

    Raises:
        BundleError: other names, types or shapes.
    """
    differing = {*inputs, *outputs} ^ {*spec.inputs, *spec.outputs}
    if differing:
        raise BundleError(
            f"engine {spec.name!r} takes and gives other tensors than the manifest says: "
            f"{sorted({tensor.name for tensor in differing})}",
            fix="rebuild the bundle",
        )


def check_bindings(
    name: str, tensors: Mapping[str, TensorRef], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    """What an engine is given is what it takes and gives.

    Raises:
        InternalError: a name is missing, or shape or dtype differ.
    """
    expected = {spec.name: spec for spec in (*inputs, *outputs)}
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise InternalError(f"engine {name!r}: tensors missing {missing}, not its own {extra}")
    for tensor, ref in tensors.items():
        spec = expected[tensor]
        if (ref.dtype, ref.shape) != (spec.dtype, spec.shape):
            raise InternalError(
                f"engine {name!r}, tensor {tensor!r}: got {ref.dtype}{list(ref.shape)}, "
                f"expected {spec.dtype}{list(spec.shape)}"
            )
