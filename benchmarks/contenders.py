"""What a benchmark compares: whoever draws images after a plan, timed part by part. Knows engines, and no torch.

Eager torch takes part as well (benchmarks/eager.py): it fits `Contender` without a word of this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastvar.core.noise import Noise
from fastvar.core.plan import GenerationPlan
from fastvar.core.precision import COMPUTE, parse_precision
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.registry import BACKEND_NAMES, backend_class, get_backend
from fastvar.errors import BackendError, BuildError, InputError
from fastvar.runtime.memory.layout import EngineCall, StepCalls
from fastvar.runtime.requests.inputs import LabelInput, TextInput
from fastvar.runtime.requests.prompt import TokenizedPrompt
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from fastvar.runtime.workspace import Workspace

EAGER = {"eager-dense": "dense", "eager-pruned": "fastvar"}  # name -> policy, where none is given
QUANTISED = "w8a8"
DEFAULTS = {
    "cpu": "eager-dense:fp32,eager-dense:bf16,eager-pruned:fp32,eager-pruned:bf16,onnxruntime:fp32,"
    "aotinductor:fp32,aotinductor:bf16,aotinductor:w8a8",
    "cuda": "eager-dense:bf16,eager-pruned:bf16,aotinductor:bf16",
}


@dataclass(frozen=True)
class Entry:
    """Who takes part: eager torch or a backend, in a precision, under a policy."""

    engine: str  # a key of EAGER, or a backend
    precision: str  # of `precision.COMPUTE`; or for backends QUANTISED, which is bf16 with int8 products
    policy: str

    @property
    def compute(self) -> str:
        """The precision of `precision.COMPUTE`, by whose peak a machine is judged."""
        return "bf16" if self.precision == QUANTISED else self.precision

    @property
    def weights(self) -> str | None:
        """How the layers' matrices are stored, where not as `compute`."""
        return QUANTISED if self.precision == QUANTISED else None

    @property
    def eager(self) -> bool:
        return self.engine in EAGER

    @property
    def program(self) -> tuple[str, str]:
        """What is computed, whatever the precision."""
        return self.engine, self.policy

    @property
    def dense_eager(self) -> bool:
        return self.eager and self.policy == "dense"


def parse_contenders(text: str, policy: str = "fastvar") -> dict[str, Entry]:
    """ "eager-pruned:bf16,onnxruntime:fp32:dense": name -> entry. `policy` is that of backends that name none.

    Raises:
        InputError: not of that form, unknown, named twice, or a precision that the backend does not compute in.
    """
    entries: dict[str, Entry] = {}
    for name in (part.strip() for part in text.split(",") if part.strip()):
        if name in entries:
            raise InputError(f"contender {name!r} is named twice", fix="name it once")
        entries[name] = _parse(name, policy)
    if not entries:
        raise InputError("no contender", expected=f"some of {DEFAULTS['cpu']}")
    return entries


def _parse(name: str, policy: str) -> Entry:
    engine, precision, own = (*name.split(":", 2), "", "")[:3]
    known = (*EAGER, *BACKEND_NAMES)
    quantised = precision == QUANTISED and engine in BACKEND_NAMES
    if engine not in known or not (quantised or precision in COMPUTE):
        raise InputError(
            f"contender {name!r} not understood",
            expected=f"ENGINE:PRECISION or ENGINE:PRECISION:POLICY, ENGINE one of {', '.join(known)}, "
            f"PRECISION one of {', '.join(COMPUTE)}, for backends {QUANTISED} too",
        )
    compute = "bf16" if quantised else precision
    if engine not in EAGER and COMPUTE[compute] not in backend_class(engine).precisions:
        raise InputError(
            f"contender {name!r}: {engine} does not compute in {precision}",
            expected=f"one of {', '.join(backend_class(engine).precisions)}",
        )
    return Entry(engine, precision, own or EAGER.get(engine, policy))


def default_contenders(device: str) -> tuple[str, dict[str, str]]:
    """The default contenders that this machine has, and of the others the reason why each is left out."""
    wanted = DEFAULTS[device].split(",")
    missing = {name: why for name in wanted if (why := _why_missing(*name.split(":")))}
    return ",".join(name for name in wanted if name not in missing), missing


def _why_missing(engine: str, precision: str) -> str:
    if engine in EAGER:
        return ""
    try:
        backend = get_backend(engine)
        backend.version()
        if precision == QUANTISED:
            backend.resolve_target(None, parse_precision("bf16", QUANTISED))
    except (BackendError, BuildError) as error:
        return error.problem
    return ""


class Contender(Protocol):
    """Draws with guidance, one image or a pass of several; times are those of all of them.

    The text comes first; then scales, and the decoder behind them.
    """

    plan: GenerationPlan

    def text(self) -> float:
        """Everything that depends on the prompt alone; milliseconds."""

    def scales(self, noise: Noise) -> list[float]:
        """Milliseconds of every executed scale, of the text last given."""

    def decode(self) -> float:
        """The image of the codes last drawn, on the host; milliseconds."""

    def logits(self, noise: Noise) -> list[NDArray[np.float32]]:
        """Guided logits [L, 2 * bits a token] of every executed scale."""


class EngineContender:
    """A bundle's engines. They can be timed launch by launch, which eager torch cannot.

    Args:
        text: ids [1, T] of a prompt where the bundle has a text encoder, else features [2, T, Ct]; every token counts.
            Of families that draw classes, a class.
        cuda_graphs: on a GPU, record the launches of a scale and replay them as one.
        images: of one pass, all of the same text, noise and settings: what is launched does not depend on them.

    Raises:
        BackendError: the bundle's backend or device is not there.
        InputError: the bundle has no engines for such a pass.
    """

    def __init__(
        self,
        bundle: Bundle,
        text: NDArray[Any] | LabelInput,
        settings: SamplingSettings,
        threads: int | None = None,
        cuda_graphs: bool = True,
        images: int = 1,
    ) -> None:
        self.manifest, self.plan, self.images = bundle.manifest, bundle.manifest.plan, images
        self._session = Session(bundle, threads=threads, cuda_graphs=cuda_graphs, batch=images)
        self.workspace: Workspace = self._session.workspace(settings.rows, images)
        self._device, self._settings, self._text = self._session.device, [settings] * images, text

    def text(self) -> float:
        start = self._device.record_event()
        give_text(self.workspace, self._text)
        return self._elapsed_ms(start)

    def scales(self, noise: Noise) -> list[float]:
        ms = [ms for _, ms in self.workspace.run_scales(self._noises(noise), self._settings, wait=False)]
        self._session.save_compiled_kernels()
        return ms

    def decode(self) -> float:
        start = self._device.record_event()
        for image in range(self.images):
            self.workspace.decode(image)
        return self._elapsed_ms(start)

    def logits(self, noise: Noise) -> list[NDArray[np.float32]]:
        """Of every scale [L * images, ...]: token by token, the images of a pass side by side."""
        steps = self.workspace.run_scales(self._noises(noise), self._settings)
        return [self.workspace.read(calls.sampling_head, "logits").copy() for calls, _ in steps]

    def launches(self, noise: Noise) -> Iterator[tuple[StepCalls | None, EngineCall, float]]:
        """The image launch by launch, without text encoder: step (None outside of scales), call, milliseconds."""
        return self.workspace.timed_launches(self._noises(noise), self._settings)

    def _noises(self, noise: Noise) -> list[Noise]:
        return [noise] * self.images

    def _elapsed_ms(self, start: Any) -> float:
        end = self._device.record_event()
        self._device.wait()
        return self._device.elapsed_ms(start, end)


def give_text(workspace: Workspace, text: NDArray[Any] | LabelInput) -> None:
    """Ids [1, T], or features [2, T, Ct], of which every token counts; or a class."""
    if isinstance(text, LabelInput):
        workspace.give([text] * workspace.images)
    elif text.ndim == 2:
        length, width = text.shape[1], workspace.manifest.text_length
        ids = np.zeros((2, 1, width), np.int64)
        ids[0, :, :length], ids[1, :, :length] = text, 1
        workspace.give([TextInput(TokenizedPrompt(ids[0], ids[1], length))] * workspace.images)
    else:
        workspace.set_features(text[0], text[1], (text.shape[1],) * 2)
