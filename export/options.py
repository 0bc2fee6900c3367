"""What a build makes: everything that decides a bundle beside its checkpoint, checked once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..core.plan import Batch, SamplingMode
from ..core.precision import AUTO
from ..engines.registry import DEFAULT
from ..errors import BuildError, RenamedWarning
from ..families.base import SamplingDefaults

MOST_IMAGES = 64  # in one pass
GUIDANCE_ROWS = {"both": (2, 1), "on": (2,), "off": (1,)}
RENAMED = {"drawing": "sampling_mode"}  # read for one version more


def check_batch(batch: object) -> None:
    """Numbers of images of a pass, as they are given.

    Raises:
        BuildError: no tuple of numbers from 1 to 64.
    """
    for count in batch if isinstance(batch, tuple) else (batch,):
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_IMAGES:
            expected = f"a tuple of whole numbers from 1 to {MOST_IMAGES}: (1, 2, 4)"
            raise BuildError(f"batch {batch!r} not understood", expected=expected)


def batches_of(batch: Iterable[int], guidance_rows: Sequence[int]) -> tuple[Batch, ...]:
    """The kinds of pass of these numbers of images, and of one, with each number of guidance rows."""
    return tuple(Batch(rows, images) for images in sorted({1, *batch}) for rows in guidance_rows)


@dataclass(frozen=True)
class BuildOptions:
    """What a bundle is to be: the options of `fastvar build` by the same names.

    Args:
        size: image size, "WIDTHxHEIGHT" in pixels or a shape as "16:9"; for None the family's default, or else the
            largest that the model draws.
        policy: token pruning: "dense", "fastvar" or another preset of the checkpoint's family, or the path of a TOML
            policy file.
        backend: who compiles the engines, by name (`fastvar doctor` lists them).
        target: the devices that engines are for; the backend's default for None.
        precision: "fp32", "bf16" or "fp16"; "auto", or None, for the fastest of them that is as accurate: on CPUs by
            measurement where the backend computes in several, else the backend's own.
        weights: "int8" or "fp8" to store the layers' matrices in 8 bits, "w8a8" for int8 activations besides.
        attention: "flash" or "cudnn" for aotinductor on GPUs; flash for None.
        allow_unfused: accept GPU engines whose attention is more than one kernel.
        via: "torch-tensorrt" for TensorRT engines without ONNX, on a GPU machine that has it.
        guidance: engines for classifier-free guidance "on", "off" or "both" ways.
        batch: how many images one pass draws: engines for each of these numbers, 1 to 64; a 1 goes with them always.
        text_length: static prompt length in tokens; the model's own for None.
        with_encoder: include the image encoder, which images are edited through.
        decoder_tile: latent rows that the image decoder holds at a time, 1 or more, for less memory and the same
            image; all of them for None.
        sampling_mode: how codes are sampled, where the family offers a choice.
        sampling: the bundle's sampling defaults; the family's own for None.
        model: which of several models in the checkpoint's folder, by its published name or that of its file.
        image_tokenizer: its file, where it does not lie in the checkpoint's folder; or hub:ORG/NAME/FILE.
        text_encoder: its folder, where it does not lie in the checkpoint's folder; or hub:ORG/NAME.

    Raises:
        BuildError: a value that no checkpoint could be built with. What depends on the checkpoint is said by the build.
    """

    size: str | None = None
    policy: str = "fastvar"
    backend: str = DEFAULT
    target: str | None = None
    precision: str | None = AUTO
    weights: str | None = None
    attention: str | None = None
    allow_unfused: bool = False
    via: str | None = None
    guidance: str = "both"
    batch: tuple[int, ...] = (1,)
    text_length: int | None = None
    with_encoder: bool = False
    decoder_tile: int | None = None
    sampling_mode: SamplingMode | None = None
    sampling: SamplingDefaults | None = None
    model: str | None = None
    image_tokenizer: Path | None = None
    text_encoder: Path | None = None

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCE_ROWS:
            expected = f"one of {', '.join(GUIDANCE_ROWS)}"
            raise BuildError(f"guidance {self.guidance!r} not understood", expected=expected)
        tile = self.decoder_tile
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise BuildError(f"decoder tile {tile!r} not understood", expected="a number of latent rows, 1 or more")
        check_batch(self.batch)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """What passes engines are made for: every number of images, with and without guidance where both are wanted."""
        return batches_of(self.batch, GUIDANCE_ROWS[self.guidance])

    def changed(self, **changes: Any) -> BuildOptions:
        """These options with some replaced, by name.

        Raises:
            BuildError: no option of that name.
        """
        for old, new in RENAMED.items():
            if old in changes:
                warnings.warn(f"the option {old} is named {new} now", RenamedWarning, stacklevel=3)
                changes[new] = changes.pop(old)
        known = [field.name for field in fields(self)]
        if unknown := sorted(changes.keys() - set(known)):
            raise BuildError(
                f"no option {', '.join(unknown)}", expected=f"some of {', '.join(known)}", fix="check the spelling"
            )
        return replace(self, **changes)
