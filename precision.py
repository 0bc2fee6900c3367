"""Which numbers a build computes in, and how it stores the layers' matrices. Nouns only."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import PlanError

# What users type -> the element type's name (engines/dtypes.py).
COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WEIGHT_FORMATS = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True)
class Precision:
    """Element types of a build.

    `compute` is that of matrix products, attention and the caches. The residual stream, the selection of tokens,
    norms and sampling stay fp32 whatever it is: in 16 bits scores tie, and other tokens win.
    `weights` is how the layers' matrices are stored: "" as `compute`, else "int8" or "float8_e4m3fn" with a scale
    for each output channel.
    """

    compute: str = "float32"
    weights: str = ""

    @property
    def label(self) -> str:
        """As the user typed it: "bf16", "bf16 with int8 weights"."""
        compute = _typed(COMPUTE, self.compute)
        return f"{compute} with {_typed(WEIGHT_FORMATS, self.weights)} weights" if self.weights else compute


def parse_precision(compute: str | None, weights: str | None = None, *, default: str = "float32") -> Precision:
    """From the command line's words; `default` is the element type for no word.

    Raises:
        PlanError: not one of COMPUTE, or not one of WEIGHT_FORMATS.
    """
    if compute is not None and compute not in COMPUTE:
        raise PlanError(f"no precision {compute!r}", expected=f"one of {', '.join(COMPUTE)}")
    if weights is not None and weights not in WEIGHT_FORMATS:
        raise PlanError(
            f"no weight format {weights!r}",
            expected=f"one of {', '.join(WEIGHT_FORMATS)}",
            fix="leave --weights away to store weights in the compute precision",
        )
    return Precision(COMPUTE[compute] if compute else default, WEIGHT_FORMATS[weights] if weights else "")


def _typed(names: dict[str, str], value: str) -> str:
    return next(typed for typed, name in names.items() if name == value)
