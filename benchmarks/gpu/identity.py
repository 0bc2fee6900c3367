"""What all measurements of a day have in common: GPU, library, model."""

from __future__ import annotations

from dataclasses import dataclass

from fastvar.engines.aotinductor.gpus import require_gpu
from fastvar.engines.aotinductor.stand_in_gpu import is_stood_in


@dataclass(frozen=True)
class Identity:
    """Args:
    gpu: its name.
    capability: as "sm90".
    torch: version.
    stand_in: whether the GPU is not there.
    model: that is timed.
    """

    gpu: str
    capability: str
    torch: str
    stand_in: bool
    model: str


def identify(model: str) -> Identity:
    """For a process of its own: whoever asks torch for a GPU takes memory of it until it ends.

    Raises:
        BackendError: there is no GPU, or no torch built for it.
    """
    import torch

    capability = require_gpu(torch)
    name = torch.cuda.get_device_properties(0).name
    return Identity(name, capability, str(torch.__version__), is_stood_in(), model)
