"""A checkpoint of any form becomes one plain `.safetensors` file under the official names.

Read in place and written tensor by tensor: neither a training checkpoint nor all shards are ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.platform import needs_extra
from ...engines.bundle.weight_file import write_weights
from ...engines.spec import TensorSpec
from ...errors import CheckpointError
from ..checkpoints.checkpoint import Loaded, read_image_tokenizer, read_transformer
from ..checkpoints.parts import find_parts
from ..checkpoints.published import CONFIG
from ..checkpoints.stored_numbers import PlainTensors
from ..checkpoints.weight_sources import as_stored
from ..models.registry import ADAPTERS, adapter_of
from .lora import Merged, read_changes

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class ConversionReport:
    """What was written.

    origin: the file that was read, and under which keys, in plain words.
    settings: a config.json beside what was read, which belongs beside `out` too: it says what tensors do not.
    """

    out: Path
    part: str  # "transformer" or "image tokenizer"
    family: str
    tensors: int
    size_bytes: int
    origin: str
    changed: int = 0  # tensors that a LoRA changed
    settings: Path | None = None


@needs_extra("export")
def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    lora: str | Path | None = None,
    scale: float = 1.0,
) -> ConversionReport:
    """Write a checkpoint as one plain `.safetensors` file with the official names.

    Of a training checkpoint averaged weights come first. Element types stay; numbers in 8 bits with scales are
    multiplied out to float32. What was lost in a LoRA's merge to 16 bits is rounding alone: it is added in float32.

    Args:
        checkpoint: a transformer or an image tokenizer: a file, the index of shards, or a folder.
        out: the new file, a `.safetensors`; written whole or not at all.
        model: which of several models in a folder.
        lora: a LoRA to merge: its file, or a folder as PEFT writes it.
        scale: strength of the LoRA; 1 is what it was trained for.

    Raises:
        CheckpointError: checkpoint or LoRA cannot be read, or do not fit; or `out` is there already.
        NumericsError: a weight is not finite.
        BundleError: the file cannot be written.
    """
    out = Path(out)
    check_out(out)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise CheckpointError(f"scale {scale!r} not understood", expected="a finite number")
    path = find_parts(Path(checkpoint), model).transformer
    part, family, loaded = _read(path)
    weights: PlainTensors | Merged = loaded.weights
    changes = {} if lora is None else read_changes(Path(lora), loaded.weights, scale)
    if changes:
        weights = Merged(loaded.weights, changes)
    written = write_weights(out, _specs(weights.stored), lambda name: as_stored(*_typed(weights[name])))
    settings = path.with_name(CONFIG)
    apart = settings.is_file() and settings.resolve() != out.with_name(CONFIG).resolve()
    return ConversionReport(
        out,
        part,
        family,
        len(weights),
        written.size_bytes,
        path.name + (f" ({loaded.nested})" if loaded.nested else ""),
        len(changes),
        settings if apart and part == "transformer" else None,
    )


def check_out(out: Path) -> None:
    """Whether a file can be written as `convert` writes it.

    Raises:
        CheckpointError: another suffix, a file that is there, or no folder for it.
    """
    if out.suffix != SUFFIX:
        raise CheckpointError(f"{out} is not named as what is written", expected=f"a name that ends in {SUFFIX}")
    if out.exists():
        raise CheckpointError(f"{out} is there already", expected="a new file", fix="give another name, or remove it")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent} is no folder", fix="make it, or give another path")


def _read(path: Path) -> tuple[str, str, Loaded[Any]]:
    """What a file is: a transformer, or the image tokenizer of some family."""
    try:
        transformer = read_transformer(path)
    except CheckpointError as error:
        for adapter in ADAPTERS.values():
            try:
                return "image tokenizer", adapter.family.name, read_image_tokenizer(path, adapter)
            except CheckpointError:
                continue
        raise error from None
    return "transformer", adapter_of(transformer.config).family.name, transformer


def _specs(stored: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, _name_of(held.dtype), tuple(held.shape)) for name, held in stored.items()}


def _typed(tensor: Tensor) -> tuple[Tensor, str]:
    return tensor, _name_of(tensor.dtype)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
