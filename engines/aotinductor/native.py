"""The C++ that engines of AOTInductor hold beside compiled programs (kernels/), compiled once a machine.

Engines link it statically, so that they need no file of this package where they run; eager torch loads it as a library.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.files import write_whole
from ...core.platform import import_extra
from ...errors import BuildError
from ..cache.engine_cache import default_folder

KERNELS = Path(__file__).parent / "kernels"
# Instructions as /proc/cpuinfo names them; each is a flag of the compiler too. Only calls of a kernel need them.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
AVX512_VNNI = (*_AVX512, "avx512_vnni")
AVX512_BF16 = (*AVX512_VNNI, "avx512_bf16")  # every CPU with the one has the other
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")  # gcc 12 warns of its own intrinsics
SOURCES = {"attention.cpp": AVX512_BF16, "linear.cpp": (), "linear_int8.cpp": AVX512_VNNI, "winograd.cpp": AVX512_VNNI}
HEADERS = ("attention_packing.h", "quantise.h", "registers.h", "winograd_points.h", "winograd_weights.h")
ARCHIVE, LIBRARY = "libfastvar.a", "fastvar.so"
INSTALL = "install a C++ compiler, such as g++"


def cpu_lacks(instructions: Sequence[str], cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of `instructions` that this CPU does not offer; all of them where `cpuinfo` cannot be read."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return tuple(instructions)
    offered = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return tuple(name for name in instructions if name not in offered)


def kernel_digest() -> str:
    """The SHA-256 of all sources and their flags, in hexadecimal."""
    digest = hashlib.sha256(repr((FLAGS, SOURCES)).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((KERNELS / name).read_bytes())
    return digest.hexdigest()


def build(folder: Path | None = None) -> Path:
    """Compile the C++ (10 s), or find it where that was done before; by default beside the kept engines.

    Returns:
        The folder of `libfastvar.a`, for engines to link, and of the shared library `LIBRARY`, for eager torch.

    Raises:
        BuildError: no C++ compiler, or it rejects the source.
    """
    compiler, torch_root = _compiler(), Path(import_extra("torch", "aotinductor").__file__).parent
    arguments = [*compiler, *FLAGS, f"-I{torch_root / 'include'}"]
    key = hashlib.sha256("\0".join([kernel_digest(), _run([*compiler, "--version"]), *arguments]).encode())
    folder = (folder or default_folder()) / f"kernels-{key.hexdigest()[:16]}"
    if all((folder / name).is_file() for name in (ARCHIVE, LIBRARY)):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        objects = [str(made / f"{source}.o") for source in SOURCES]
        for (source, instructions), compiled in zip(SOURCES.items(), objects, strict=True):
            flags = [f"-m{instruction.replace('_', '')}" for instruction in instructions]
            _run([*arguments, *flags, "-c", str(KERNELS / source), "-o", compiled])
        _run(["ar", "rcsD", str(made / ARCHIVE), *objects])
        torch_cpu = [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        _run([*compiler, "-shared", "-fopenmp", *objects, *torch_cpu, "-o", str(made / LIBRARY)])
        for name in (LIBRARY, ARCHIVE):
            write_whole(folder / name, (made / name).read_bytes())
    return folder


def inductor_options(operators: Mapping[Any, str], folder: Path | None = None) -> dict[str, Any]:
    """Options of AOTInductor for calling our functions for operators, and for linking them into the engine.

    Args:
        operators: an operator of torch -> the C declaration of its function.
        folder: as of `build`.

    Returns:
        `inductor_configs` for `aoti_compile_and_package`, or for `torch._inductor.config.patch`.

    Raises:
        BuildError: as of `build`.
    """
    where = build(folder)
    return {
        # The comment lets programs that differ only in our code differ in their text, by which torch names its files.
        "aot_inductor.custom_ops_to_c_shims": {op: [f"{text} /* {where.name} */"] for op, text in operators.items()},
        "aot_inductor.custom_op_libs": [f"fastvar -L{shlex.quote(str(where))}"],
    }


def _compiler() -> list[str]:
    """The compiler that torch links engines with, so that both use one OpenMP runtime."""
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
