"""Which numbers a build computes in, and how it stores the layers' matrices. Nouns only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import PlanError

# What users type -> the element type's name (core/dtypes.py).
COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
AUTO = "auto"  # what users type for the fastest of COMPUTE, of those that are accurate
# What users type -> the matrices' element type, and that of what they are multiplied with where it is quantised too.
WEIGHT_FORMATS = {"int8": ("int8", ""), "fp8": ("float8_e4m3fn", ""), "w8a8": ("int8", "int8")}


@dataclass(frozen=True)
class Precision:
    """Element types of a build.

    `compute` is that of matrix products, attention and the caches. The residual stream, the selection of tokens,
    norms and sampling stay fp32 whatever it is: in 16 bits scores tie, and other tokens win.
    `weights` is how the layers' matrices are stored: "" as `compute`, else "int8" or "float8_e4m3fn" with a scale
    for each output channel.
    `activations` is what the inputs of those matrices are rounded to, each row by a scale of its own, for a product of
    integers: "" for not at all, else "int8". It goes with int8 weights and bfloat16 alone.

    Raises:
        PlanError: `activations` without the others.
    """

    compute: str = "float32"
    weights: str = ""
    activations: str = ""

    def __post_init__(self) -> None:
        if self.activations and (self.compute, self.weights, self.activations) != ("bfloat16", "int8", "int8"):
            raise PlanError(
                f"--weights w8a8 in {_typed(COMPUTE, self.compute)}",
                expected="bf16: results of the integer products are rounded to it",
                fix="build with --precision bf16 for a backend that quantises activations, or with --weights int8",
            )

    @property
    def label(self) -> str:
        """In words: "bf16", "bf16 with int8 weights", "bf16 with int8 weights and activations"."""
        compute = _typed(COMPUTE, self.compute)
        if not self.weights:
            return compute
        stored = _typed(WEIGHT_FORMATS, (self.weights, ""))
        return f"{compute} with {stored} weights{' and activations' if self.activations else ''}"


@dataclass(frozen=True)
class PrecisionChoice:
    """How a build came to compute in what it does.

    `asked` says whether its maker named it; else `reason` says in plain words why it was chosen. `gflops` are those of
    one thread, measured, by element type ("float32", ..., and "int8"), on the CPU `cpu` with the library `library`; all
    three are empty where nothing was measured.
    """

    asked: bool
    reason: str = ""
    cpu: str = ""
    library: str = ""
    gflops: dict[str, float] = field(default_factory=dict)

    @property
    def told(self) -> str:
        """In one line."""
        if self.asked:
            return "asked for"
        measured = f"; {speeds_told(self.gflops)} on {self.cpu} with {self.library}" if self.gflops else ""
        return f"{AUTO}: {self.reason}{measured}"


def told_of(precision: Precision, choice: PrecisionChoice | None) -> str:
    """A build's precision and how it came to it, in one line."""
    return precision.label if choice is None else f"{precision.label}, {choice.told}"


def speeds_told(gflops: Mapping[str, float]) -> str:
    """ "fp32 75, bf16 149 GFLOP/s a thread", of figures by element type, the finest first."""
    words = {**{name: typed for typed, name in COMPUTE.items()}, "int8": "int8"}
    told = ", ".join(f"{typed} {gflops[name]:.0f}" for name, typed in words.items() if name in gflops)
    return f"{told} GFLOP/s a thread"


def parse_precision(compute: str | None, weights: str | None = None, *, default: str = "float32") -> Precision:
    """From the command line's words; `default` is the element type for no word, and for AUTO.

    Raises:
        PlanError: not one of COMPUTE, or not one of WEIGHT_FORMATS, or two that do not go together.
    """
    if compute not in (None, AUTO, *COMPUTE):
        raise PlanError(f"no precision {compute!r}", expected=f"one of {', '.join((AUTO, *COMPUTE))}")
    if weights is not None and weights not in WEIGHT_FORMATS:
        raise PlanError(
            f"no weight format {weights!r}",
            expected=f"one of {', '.join(WEIGHT_FORMATS)}",
            fix="leave --weights away to store weights in the compute precision",
        )
    stored, activations = WEIGHT_FORMATS[weights] if weights else ("", "")
    return Precision(COMPUTE.get(compute or AUTO, default), stored, activations)


def _typed(names: Mapping[str, object], value: object) -> str:
    return next(typed for typed, name in names.items() if name == value)
