"""NVIDIA GPUs that AOTInductor compiles for: their facts by generation, and how targets are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import BackendError, BuildError

CUDA = "cuda"
FLASH, CUDNN = "flash", "cudnn"
ATTENTIONS = (FLASH, CUDNN)  # kernels of attention without a mask, the default first


@dataclass(frozen=True)
class Gpu:
    """What a compiler asks of a GPU, of one product of its generation.

    Args:
        name: the product.
        processors: streaming multiprocessors.
        threads: resident on one of them at most.
        shared_block_bytes: shared memory that one block may ask for.
        shared_processor_bytes: shared memory of a multiprocessor.
        l2_bytes: the second-level cache.
    """

    name: str
    processors: int
    threads: int
    shared_block_bytes: int
    shared_processor_bytes: int
    l2_bytes: int


# Source: NVIDIA's CUDA programming guide, technical specifications by compute capability, and the products' papers.
GPUS = {
    "sm80": Gpu("NVIDIA A100", 108, 2048, 166912, 167936, 40 << 20),
    "sm86": Gpu("NVIDIA GeForce RTX 3090", 82, 1536, 101376, 102400, 6 << 20),
    "sm89": Gpu("NVIDIA GeForce RTX 4090", 128, 1536, 101376, 102400, 72 << 20),
    "sm90": Gpu("NVIDIA H100", 132, 2048, 232448, 233472, 50 << 20),
    "sm120": Gpu("NVIDIA GeForce RTX 5090", 170, 1536, 101376, 102400, 96 << 20),
}


@dataclass(frozen=True)
class GpuTarget:
    """A generation and an attention kernel: "cuda-sm90", "cuda-sm90-cudnn". Without a generation: the GPU at hand's."""

    capability: str = ""
    attention: str = FLASH

    def __str__(self) -> str:
        parts = (CUDA, self.capability, "" if self.attention == FLASH else self.attention)
        return "-".join(part for part in parts if part)

    @classmethod
    def parse(cls, text: str) -> GpuTarget:
        """The target that a user wrote.

        Raises:
            BuildError: no such target.
        """
        first, *parts = text.split("-")
        attention = parts.pop() if parts and parts[-1] in ATTENTIONS else FLASH
        capability = parts.pop() if parts else ""
        if first != CUDA or parts or (capability and capability not in GPUS):
            raise BuildError(
                f"AOTInductor builds for no GPU {text!r}",
                expected=f"{CUDA} or one of {', '.join(f'{CUDA}-{name}' for name in GPUS)}, or that with -{CUDNN}",
            )
        return cls(capability, attention)


def is_gpu(target: str) -> bool:
    """Whether a target is a GPU's."""
    return target.partition("-")[0] == CUDA


def capability_here(torch: Any) -> str:
    """The generation of the GPU in this machine, "sm90" say; empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def require_gpu(torch: Any) -> str:
    """The same.

    Raises:
        BackendError: there is none.
    """
    found = capability_here(torch)
    if not found:
        raise BackendError(
            "torch finds no GPU",
            expected="an NVIDIA GPU and a CUDA build of torch",
            fix="run there; or build for the CPU: leave --target away",
        )
    return found
