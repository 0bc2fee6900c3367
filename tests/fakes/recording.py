"""A device and engines that compute nothing and write down what they are given: every address, read or written."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastvar.core.dtypes import size_bytes, storage_dtype
from fastvar.core.tensors import Launch, Scratch, TensorRef
from fastvar.engines.base import Engine, check_bindings
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.device import Allocation, Device
from fastvar.engines.spec import EngineSpec, TensorSpec
from fastvar.runtime.memory.arena import Memory
from fastvar.runtime.memory.layout import build_layout
from fastvar.runtime.requests.inputs import TextInput
from fastvar.runtime.requests.prompt import TokenizedPrompt
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.workspace import Workspace
from tests.models.described_engines import TEXT_LENGTH

BASE = 0x7F00_0000_0100  # a multiple of 256 and of nothing larger
TEXT_WIDTH = 128


@dataclass(frozen=True)
class Launched:
    """What an engine was bound to."""

    engine: EngineSpec
    tensors: Mapping[str, TensorRef]
    scratch: Scratch | None


@dataclass(frozen=True)
class Written:
    """By the host."""

    ref: TensorRef


@dataclass(frozen=True)
class Read:
    """By the host."""

    ref: TensorRef


class Block(Allocation):
    def __init__(self, size: int) -> None:
        self.address, self.size_bytes = BASE, size


class RecordingDevice(Device):
    """Writes down what it is given, in order."""

    name = "recording"
    shares_host_memory = False

    def __init__(self) -> None:
        self.log: list[Launched | Written | Read] = []
        self.allocations: list[int] = []

    def allocate(self, size: int) -> Allocation:
        self.allocations.append(size)
        return Block(size)

    def free_bytes(self) -> int | None:
        return None

    def write(self, target: TensorRef, values: np.ndarray) -> None:
        np.broadcast_to(values, target.shape)
        self.log.append(Written(target))

    def read(self, source: TensorRef) -> np.ndarray:
        self.log.append(Read(source))
        return np.zeros(source.shape, storage_dtype(source.dtype))

    def copy(self, target: TensorRef, source: TensorRef) -> None:
        raise AssertionError("nothing that lies where it may is copied")

    def capture_graph(self, launches: Sequence[Launch]) -> Launch:
        def run() -> None:
            for launch in launches:
                launch()

        run()
        return run

    def record_event(self) -> None:
        return None

    def elapsed_ms(self, start: None, end: None) -> float:
        return 0.0

    def wait(self) -> None:
        pass


class RecordingEngine(Engine):
    def __init__(self, spec: EngineSpec, device: RecordingDevice, prepared: list[Launched]) -> None:
        self.scratch_bytes = spec.report.scratch_bytes
        self._spec, self._device, self._prepared = spec, device, prepared

    def prepare(self, tensors: Mapping[str, TensorRef], scratch: Scratch | None = None) -> Launch:
        check_bindings(self._spec.name, tensors, self._spec.inputs, self._spec.outputs)
        launched = Launched(self._spec, dict(tensors), scratch)
        self._prepared.append(launched)
        return lambda: self._device.log.append(launched)


class DescribedWeights:
    """The weight file, as the manifest implies it."""

    def __init__(self, manifest: Manifest) -> None:
        self._specs: dict[str, TensorSpec] = {}
        for spec, layer in itertools.product(manifest.engines.values(), range(manifest.plan.depth)):
            for tensor, name in spec.weights.items():
                self._specs[name.format(layer=layer)] = spec.tensor(tensor)

    def __getitem__(self, name: str) -> np.ndarray:
        spec = self._specs[name]
        return np.zeros(spec.shape, storage_dtype(spec.dtype))

    def ref(self, name: str) -> TensorRef:
        spec = self._specs[name]
        return TensorRef(64, spec.dtype, spec.shape)  # where the host has it, which no engine may be told


@dataclass
class Played:
    """Workspaces for one manifest on a recording device."""

    manifest: Manifest
    offload: bool
    device: RecordingDevice = field(default_factory=RecordingDevice)
    prepared: list[Launched] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layouts = [
            build_layout(self.manifest, *s.batch, offload_text_encoder=self.offload) for s in self.manifest.sets
        ]
        self.memory = Memory(self.device, self.layouts, DescribedWeights(self.manifest))
        self.uploads = [entry.ref for entry in self.device.log if isinstance(entry, Written)]
        engines = {n: RecordingEngine(s, self.device, self.prepared) for n, s in self.manifest.engines.items()}
        uncond = np.zeros((TEXT_LENGTH, TEXT_WIDTH), np.float32)
        self.workspaces = {
            layout.rows: Workspace(self.manifest, engines, self.memory, layout.rows, uncond)
            for layout in self.layouts
            if layout.images == 1
        }

    @property
    def weight_bytes(self) -> int:
        return self.memory.weight_bytes

    def image(self, rows: int, negative: bool, wait: bool) -> list[Launched | Written | Read]:
        """Draw, look at everything a user may look at, and return what happened."""
        self.device.log.clear()
        workspace, prompt = self.workspaces[rows], text(TEXT_LENGTH - 1)
        if wait:
            workspace.encode_image(np.zeros(workspace.layout.encoder.tensors["image"].shape[1:], np.float32))
        workspace.give(TextInput(prompt, text(1) if negative and rows == 2 else None))
        sampling_mode = workspace.run_scales(noise, SamplingSettings(1.0 if rows == 1 else 3.0, 1.0, 0.9), wait=wait)
        for calls, _ in sampling_mode:
            if wait:
                workspace.summed_codes(calls)
                for view in (view for kept in calls.kept.values() for view in kept.values()):
                    workspace.read_view(view)
        workspace.decode()
        return list(self.device.log)


def text(length: int) -> TokenizedPrompt:
    ids = np.ones((1, TEXT_LENGTH), np.int64)
    return TokenizedPrompt(ids, np.arange(TEXT_LENGTH)[None] < length, length)


def noise(_scale: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


def span(ref: TensorRef) -> tuple[int, int]:
    """First byte, and the one behind the last, from the start of the allocation."""
    start = ref.address - BASE
    return start, start + size_bytes(ref.dtype, ref.shape)


def apart(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[1] <= other[0] or other[1] <= one[0]


def worked_in(launch: Launched) -> tuple[int, int]:
    if launch.scratch is None:
        return (0, 0)
    start = launch.scratch.address - BASE
    return start, start + launch.scratch.size_bytes
