"""CPUs that AOTInductor compiles for: instruction sets by name, each an extension of the one before."""

from __future__ import annotations

from typing import Any

from ...core.platform import import_extra
from ...errors import BackendError, BuildError

CPU = "cpu"
# What users type -> the compiler's name of the smallest CPU that has it, and the width of its vectors in bits.
_LEVELS = {
    "cpu-avx2": ("x86-64-v3", 256),
    "cpu-avx512": ("cascadelake", 512),  # with the integer dot products that torch takes for granted beside it
    "cpu-avx512-bf16": ("cooperlake", 512),
    "cpu-amx": ("sapphirerapids", 512),
}
# Our kernels use vector instructions. A CPU that multiplies tiles (AMX) is left to torch, which does so.
WITH_KERNEL = "cpu-avx512-bf16"  # attention is our kernel's (operators.py)
WITH_INT8_PRODUCTS = ("cpu-avx512", WITH_KERNEL)  # linear layers of int8 activations are
_SHORT_FLOATS = {WITH_KERNEL: ("bfloat16",), "cpu-amx": ("bfloat16", "float16")}  # products of 16 bits


def cpu_names() -> tuple[str, ...]:
    """All targets, the least demanding first."""
    return tuple(_LEVELS)


def accurate_types(target: str) -> tuple[str, ...]:
    """Element types that CPUs of a target have instructions for products in, the finest first."""
    return ("float32", *_SHORT_FLOATS.get(target, ()))


def onednn_types(target: str) -> tuple[str, ...]:
    """Element types in which oneDNN's linear layer runs on every CPU of a target; it refuses others where a CPU lacks
    instructions. Torch's own asks oneDNN where that can, and computes by itself where not.
    """
    return ("float32",) if target == "cpu-avx2" else ("float32", "bfloat16")


def best_cpu(torch: Any) -> str:
    """The most demanding target that this machine meets.

    Raises:
        BackendError: it meets none.
    """
    offered = _offered(torch)
    if not offered:
        raise BackendError(
            f"this CPU ({torch.backends.cpu.get_cpu_capability()}) is none that AOTInductor engines are made for",
            expected=f"one of {', '.join(_LEVELS)}",
            fix="build with --backend onnxruntime",
        )
    return offered[-1]


def check_cpu(torch: Any, target: str, what: str = "") -> str:
    """A target that this machine meets: compiled engines are loaded once when they are built.

    Raises:
        BuildError: no such target.
        BackendError: this CPU lacks its instructions.
    """
    if target not in _LEVELS:
        raise BuildError(
            f"AOTInductor builds for no target {target!r}",
            expected=f"one of {', '.join(_LEVELS)}, cuda, cuda-sm90 and the like",
        )
    if target not in _offered(torch):
        raise BackendError(
            f"{what or 'asked'} for {target}, this CPU offers {', '.join(_offered(torch)) or 'none of these'}",
            expected=f"a CPU with the instructions of {target}",
            fix="rebuild the bundle here, or for an older CPU with --target cpu-avx2",
        )
    return target


def _offered(torch: Any) -> tuple[str, ...]:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        return ("cpu-avx2",)
    if capability != "AVX512" or not torch.cpu._is_vnni_supported():
        return ()
    names = ["cpu-avx2", "cpu-avx512"]
    if torch.cpu._is_avx512_bf16_supported():
        names += ["cpu-avx512-bf16", *(["cpu-amx"] if torch.cpu._is_amx_tile_supported() else [])]
    return tuple(names)


def require_cpu_options(torch: Any) -> None:
    """Refuse a torch that cannot be told which CPU to compile for: it would compile for the one at hand.

    Raises:
        BuildError: it is older than 2.13.
    """
    known = import_extra("torch._inductor.config", "aotinductor").get_config_copy()
    missing = [name for name in compiler_options(next(iter(_LEVELS))) if name not in known]
    if missing:
        raise BuildError(
            f"torch {torch.__version__} does not know {', '.join(missing)}",
            expected="torch 2.13 or newer for engines on CPUs; for GPUs 2.11",
            fix="install it, or build with --backend onnxruntime",
        )


def compiler_options(target: str) -> dict[str, Any]:
    """What AOTInductor is told: instructions of the target alone, and threads by the machine that runs it."""
    march, bits = _LEVELS[target]
    return {
        "cpp.march": march,
        "cpp.simdlen": bits,
        "cpp.dynamic_threads": True,
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.enable_frame_pointer": False,
        "compile_threads": 1,  # the build has its own workers
    }
