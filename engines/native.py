"""What engines of AOTInductor hold beside compiled programs: our C++ (kernels/), compiled once a machine.

Engines link it statically, so that they need nothing of ours where they run; eager torch loads it as a library.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError
from ..packages import import_extra
from .cache import default_folder, write_whole

KERNELS = Path(__file__).parent / "kernels"
# As /proc/cpuinfo names them, each a flag of the compiler too. Only what calls a kernel needs those of its source.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
AVX512_BF16 = (*_AVX512, "avx512_bf16")
AVX512_VNNI = (*_AVX512, "avx512_vnni")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")  # gcc 12 warns of its own intrinsics
SOURCES = {"attention.cpp": AVX512_BF16, "linear.cpp": (), "linear_int8.cpp": AVX512_VNNI}
INSTALL = "install a C++ compiler, such as g++"


def cpu_lacks(instructions: Sequence[str], cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of `instructions` that this CPU does not offer; all of them where nobody can tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return tuple(instructions)
    offered = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return tuple(name for name in instructions if name not in offered)


def source_digest() -> str:
    """Of all sources and their flags."""
    digest = hashlib.sha256(repr((FLAGS, SOURCES)).encode())
    for name in SOURCES:
        digest.update((KERNELS / name).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Native:
    """Our compiled C++: a static archive for engines to link, and a shared library for eager torch."""

    archive: Path
    library: Path


def build(folder: Path | None = None) -> Native:
    """Compile it (5 s), or find it where that was done before; by default beside the kept engines.

    Raises:
        BuildError: no C++ compiler, or it rejects the source.
    """
    compiler, torch_root = _compiler(), Path(import_extra("torch", "aotinductor").__file__).parent
    arguments = [*compiler, *FLAGS, f"-I{torch_root / 'include'}"]
    key = hashlib.sha256("\0".join([source_digest(), _run([*compiler, "--version"]), *arguments]).encode())
    folder = (folder or default_folder()) / f"kernels-{key.hexdigest()[:16]}"
    native = Native(folder / "libfastvar.a", folder / "fastvar.so")
    if native.archive.is_file() and native.library.is_file():
        return native
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        archive, library = Path(name) / "fastvar.a", Path(name) / "fastvar.so"
        objects = [str(Path(name) / f"{source}.o") for source in SOURCES]
        for (source, instructions), compiled in zip(SOURCES.items(), objects, strict=True):
            flags = [f"-m{name.replace('_', '')}" for name in instructions]
            _run([*arguments, *flags, "-c", str(KERNELS / source), "-o", compiled])
        _run(["ar", "rcsD", str(archive), *objects])
        torch_cpu = [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        _run([*compiler, "-shared", "-fopenmp", *objects, *torch_cpu, "-o", str(library)])
        write_whole(native.library, library.read_bytes())
        write_whole(native.archive, archive.read_bytes())
    return native


def inductor_options(operators: Mapping[Any, str], folder: Path | None = None) -> dict[str, Any]:
    """What AOTInductor has to be told to call our functions for operators, and to link them into the engine.

    For `inductor_configs` of `aoti_compile_and_package`, or `torch._inductor.config.patch`.

    Args:
        operators: an operator of torch -> the C declaration of its function.
    """
    where = build(folder).archive.parent
    return {
        # The comment lets programs that differ only in our code differ in their text, by which torch names its files.
        "aot_inductor.custom_ops_to_c_shims": {op: [f"{text} /* {where.name} */"] for op, text in operators.items()},
        "aot_inductor.custom_op_libs": [f"fastvar -L{shlex.quote(str(where))}"],
    }


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
