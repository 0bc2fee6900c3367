"""What a build compiles with: a backend, the devices it is for, and the numbers it computes in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.precision import Precision, PrecisionChoice, told_of
from ..engines.base import ONNX, Backend
from ..engines.registry import BACKEND_NAMES, DEFAULT, backend_class, get_backend
from ..engines.spec import EngineReport
from ..errors import BuildError
from .options import BuildOptions


@dataclass(frozen=True)
class Toolchain:
    """A backend with a target that it builds for and a precision that it computes in, and why in that one."""

    backend: Backend
    target: str
    precision: Precision
    allow_unfused: bool = False
    via: str = ONNX
    choice: PrecisionChoice | None = None  # None where nothing was noted of it

    @property
    def told(self) -> str:
        """What is computed in and why, in one line."""
        return told_of(self.precision, self.choice)

    def check_fused(self, name: str, attentions: int, report: EngineReport) -> None:
        """An attention in pieces writes its scores to memory, which costs what pruning gains: refuse it.

        Backends that report no kernels are not asked.

        Raises:
            BuildError: not every attention of the graph became one kernel.
        """
        if self.allow_unfused or report.kernels == 0 or report.fused_attentions >= attentions:
            return
        raise BuildError(
            f"engine {name!r}: {report.fused_attentions} of {attentions} attentions became one kernel each",
            expected=f"all of them, as {self.backend.name} does in bf16 and fp16 with heads of 32 to 256 channels",
            fix="build with --precision bf16 or fp16, or accept slower engines with --allow-unfused",
        )


def make_toolchain(
    backend: str = DEFAULT,
    target: str | None = None,
    precision: str | None = None,
    weights: str | None = None,
    allow_unfused: bool = False,
    via: str | None = None,
    kept: Path | None = None,
) -> Toolchain:
    """A toolchain from the command line's words; the backend's own defaults for None.

    `kept`: the folder where measurements of this machine are kept; None to neither read nor keep any.

    Raises:
        FastvarError: a backend that is not installed, or a target or precision that it does not build for.
    """
    found = get_backend(backend, target=target)
    numbers, choice = found.precision(precision, weights, kept)
    if via is None:
        via = found.graph_form
    _check_via(via, found, numbers)
    return Toolchain(found, found.resolve_target(target, numbers), numbers, allow_unfused, via, choice)


def toolchain_of(options: BuildOptions, kept: Path | None = None) -> Toolchain:
    """The toolchain that a build's options ask for; `kept` as of `make_toolchain`.

    Raises:
        FastvarError: as `make_toolchain`.
    """
    target = options.target
    if options.attention is not None:
        target = backend_class(options.backend).with_attention(target, options.attention)
    return make_toolchain(
        options.backend, target, options.precision, options.weights, options.allow_unfused, options.via, kept
    )


def _check_via(via: str, backend: Backend, precision: Precision) -> None:
    if via == backend.graph_form:
        return
    makers = [name for name in BACKEND_NAMES if via in backend_class(name).conversions]
    if not makers:
        ways = (backend.graph_form, *backend.conversions)
        raise BuildError(f"no way {via!r} to an engine", expected=" or ".join(ways))
    if backend.name not in makers:
        raise BuildError(
            f"{via} makes engines for the backend {makers[0]}, not {backend.name}", fix=f"add --backend {makers[0]}"
        )
    if precision.weights:
        raise BuildError(f"{via} does not store weights in 8 bits", fix="leave --via or --weights away")
