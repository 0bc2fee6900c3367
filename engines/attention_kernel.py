"""The operator fastvar::attention, and the C++ kernel behind it (kernels/attention.cpp), for bfloat16 on CPUs.

Engines link the kernel statically: they hold it, and call it without Python. Eager torch calls it through ctypes.
Knows no backend and no model. Torch is imported when an operator is asked for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError, BuildError
from ..packages import import_extra
from .cache import default_folder, write_whole

SOURCE = Path(__file__).parent / "kernels" / "attention.cpp"
OPERATOR = "fastvar::attention"
SCHEMA = "(Tensor q, Tensor keys, Tensor values, Tensor? bias) -> Tensor"
DECLARATION = (
    "int32_t aoti_torch_cpu_attention(AtenTensorHandle q, AtenTensorHandle keys, AtenTensorHandle values, "
    "AtenTensorHandle* bias, AtenTensorHandle* out)"
)
# As /proc/cpuinfo names them, each a flag of the compiler too.
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
LARGEST_HEAD, HEAD_STEP = 256, 16
FLAGS = (
    *(f"-m{name.replace('_', '')}" for name in INSTRUCTIONS),
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w"),  # gcc 12 warns of its own intrinsics
)
INSTALL = "install a C++ compiler, such as g++"
STATUS = {1: "unsupported head size", 2: "no keys", 3: "no memory for its scratch"}


def supports(head_dim: int, dtype: str = "bfloat16") -> bool:
    """Whether the kernel takes heads of this size; a program with others keeps torch's own attention."""
    return dtype == "bfloat16" and 0 < head_dim <= LARGEST_HEAD and head_dim % HEAD_STEP == 0


def cpu_lacks(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Instruction sets that the kernel needs and this CPU does not offer; all of them where nobody can tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return INSTRUCTIONS
    offered = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return tuple(name for name in INSTRUCTIONS if name not in offered)


@dataclass(frozen=True)
class Kernel:
    """The compiled kernel: a static archive for engines to link, and a shared library for eager torch."""

    archive: Path
    library: Path


def build(folder: Path | None = None) -> Kernel:
    """Compile the kernel (2 s), or find it where that was done before; by default beside the kept engines.

    Raises:
        BuildError: no C++ compiler, or it rejects the source.
    """
    compiler, torch_root = _compiler(), Path(import_extra("torch", "aotinductor").__file__).parent
    arguments = [*compiler, *FLAGS, f"-I{torch_root / 'include'}"]
    key = hashlib.sha256("\0".join([SOURCE.read_text(), _run([*compiler, "--version"]), *arguments]).encode())
    folder = (folder or default_folder()) / f"attention-{key.hexdigest()[:16]}"
    kernel = Kernel(folder / "libfastvar_attention.a", folder / "fastvar_attention.so")
    if kernel.archive.is_file() and kernel.library.is_file():
        return kernel
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        compiled, archive, library = (Path(name) / file for file in ("attention.o", "attention.a", "attention.so"))
        torch_cpu = [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        _run([*arguments, "-c", str(SOURCE), "-o", str(compiled)])
        _run(["ar", "rcsD", str(archive), str(compiled)])
        _run([*compiler, "-shared", "-fopenmp", str(compiled), *torch_cpu, "-o", str(library)])
        write_whole(kernel.library, library.read_bytes())
        write_whole(kernel.archive, archive.read_bytes())
    return kernel


def inductor_options(folder: Path | None = None) -> dict[str, Any]:
    """What AOTInductor has to be told to call the kernel and to link it into the engine.

    For `inductor_configs` of `aoti_compile_and_package`, or `torch._inductor.config.patch`.
    """
    where = build(folder).archive.parent
    # The comment lets programs that differ only in the kernel differ in their text, by which torch names its files.
    return {
        "aot_inductor.custom_ops_to_c_shims": {register(): [f"{DECLARATION} /* {where.name} */"]},
        "aot_inductor.custom_op_libs": [f"fastvar_attention -L{shlex.quote(str(where))}"],
    }


@functools.cache
def register() -> Any:
    """Make torch.ops.fastvar.attention known to this process: for tracing, for loading programs, and for eager use.

    q [L, heads, head_dim], keys and values [S, heads, head_dim], all bfloat16; bias [heads, 1, S] fp32 or None, finite:
    about -1e30 masks a key. Token and head strides are free, so prefixes and slices of a cache are read in place.
    -> [L, heads, head_dim] contiguous. The queries are scaled beforehand.
    """
    torch = import_extra("torch", "aotinductor")

    def attention(q: Any, keys: Any, values: Any, bias: Any) -> Any:
        _check(torch, q, keys, values, bias)
        out = torch.empty(q.shape, dtype=q.dtype)
        strides = [(ctypes.c_int64 * 2)(*tensor.stride()[:2]) for tensor in (q, keys, values)]
        masked = (0, 0) if bias is None else (bias.data_ptr(), bias.stride(0))
        operands = [item for t, s in zip((q, keys, values), strides, strict=True) for item in (t.data_ptr(), s)]
        sizes = (q.shape[0], keys.shape[0], *q.shape[1:])
        status = _function()(*operands, *masked, out.data_ptr(), *sizes, torch.get_num_threads())
        if status:
            raise RuntimeError(f"{OPERATOR}: {STATUS[status]}")
        return out

    def fake(q: Any, keys: Any, values: Any, bias: Any) -> Any:
        _check(torch, q, keys, values, bias)
        return q.new_empty(q.shape)

    operator = torch.library.custom_op(OPERATOR, attention, mutates_args=(), device_types="cpu", schema=SCHEMA)
    operator.register_fake(fake)
    return torch.ops.fastvar.attention.default


def _check(torch: Any, q: Any, keys: Any, values: Any, bias: Any) -> None:
    heads, head_dim = q.shape[1:]
    if not supports(head_dim):
        raise ValueError(f"{OPERATOR} of heads of {head_dim}: expected a multiple of {HEAD_STEP} up to {LARGEST_HEAD}")
    if keys.shape != values.shape or tuple(keys.shape[1:]) != (heads, head_dim) or keys.shape[0] < 1:
        raise ValueError(f"{OPERATOR}: q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}")
    if bias is not None and (tuple(bias.shape) != (heads, 1, keys.shape[0]) or bias.dtype != torch.float32):
        raise ValueError(f"{OPERATOR}: bias {list(bias.shape)} {bias.dtype}, expected [heads, 1, S] in float32")
    for tensor in (q, keys, values):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"{OPERATOR} on {tensor.dtype}: expected torch.bfloat16")
    for tensor in (q, keys, values, bias):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{OPERATOR}: strides {tensor.stride()}, expected a contiguous last axis")


@functools.cache
def _function() -> Callable[..., int]:
    if lacking := cpu_lacks():
        raise BackendError(f"{OPERATOR}: this CPU lacks {', '.join(lacking)}", fix="use scaled_dot_product_attention")
    function = ctypes.CDLL(str(build().library)).fastvar_attention
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [*[pointer] * 7, integer, pointer, *[integer] * 4, ctypes.c_int32]
    function.restype = ctypes.c_int32
    return function


def _compiler() -> list[str]:
    """The compiler that torch links engines with: one OpenMP runtime for both."""
    builder = import_extra("torch._inductor.cpp_builder", "aotinductor")
    try:
        return shlex.split(str(builder.get_cpp_compiler()))
    except RuntimeError as error:
        raise BuildError(f"torch finds no C++ compiler: {error}", fix=INSTALL) from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} is not installed", fix=INSTALL) from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed: {error.stderr.strip()[:1000]}") from error
    return done.stdout
