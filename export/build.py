"""Ahead-of-time build: checkpoint -> plan -> step graphs -> engines -> bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.plan import GenerationPlan, SamplingMode
from ..core.platform import needs_extra
from ..core.precision import Precision
from ..core.version import __version__
from ..engines.bundle.bundle import BundleWriter
from ..engines.bundle.manifest import FileRecord, Manifest
from ..engines.bundle.weight_file import write_weights
from ..engines.cache.engine_cache import EngineCache
from ..engines.registry import DEFAULT
from ..engines.spec import EngineSpec, TensorSpec
from ..errors import BuildError
from ..families.base import SamplingDefaults
from .assembly import Assembly, latent_grid
from .checkpoints.checkpoint import CLASS_NAMES, Checkpoint, load_checkpoint
from .checkpoints.tokenizer_files import check_tokenizer
from .checkpoints.weight_sources import edge_weights, engine_weights, preview_weights
from .construction import WEIGHTS, BuildReport, Construction, Progress, check_fit, open_cache
from .describe import assemble_checkpoint, text_length_of
from .factory import EngineFactory
from .models.common.decoder_stages import contiguous_bytes
from .models.common.quantise import quantise_sources
from .models.common.weights import WeightSource
from .models.registry import adapter_of
from .toolchain import Toolchain, make_toolchain

GUIDANCE_ROWS = {"both": (2, 1), "on": (2,), "off": (1,)}


@needs_extra("export")
def build(
    checkpoint: str | Path | Checkpoint,
    *,
    out: str | Path,
    size: str | None = None,
    policy: str = "fastvar",
    backend: str = DEFAULT,
    target: str | None = None,
    precision: str | None = None,
    weights: str | None = None,
    allow_unfused: bool = False,
    via: str | None = None,
    guidance: str = "both",
    text_length: int | None = None,
    with_encoder: bool = False,
    decoder_tile: int | None = None,
    sampling_mode: SamplingMode | None = None,
    sampling: SamplingDefaults | None = None,
    image_tokenizer: Path | None = None,
    text_encoder: Path | None = None,
    cache: EngineCache | Path | bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build a bundle.

    Args:
        checkpoint: folder or transformer file in an official format, or a loaded `Checkpoint`.
        out: the bundle folder; replaced as a whole when the build is complete.
        size: image size, "WIDTHxHEIGHT" in pixels; Infinity's default is 1024x1024, other families' their largest.
        policy: "dense", "fastvar" as the checkpoint's family has it, or a TOML policy file.
        backend: who compiles.
        target: for which devices; the backend's default for None.
        precision: "fp32", "bf16" or "fp16"; the backend's default for None.
        weights: "int8" or "fp8" to store the layers' matrices in 8 bits, "w8a8" for int8 activations besides.
        allow_unfused: accept GPU engines whose attention is more than one kernel.
        via: "torch-tensorrt" for TensorRT engines without ONNX, on a GPU machine that has it.
        guidance: engines for classifier-free guidance "on", "off" or "both" ways.
        text_length: static prompt length in tokens; the model's own by default.
        with_encoder: include the image encoder.
        decoder_tile: latent rows that the image decoder holds at a time, for less memory and the same image; any
            number from 1 on, all of them by default.
        drawing: how codes are drawn, where the family offers a choice.
        sampling: defaults of the bundle; the family's own by default.
        cache: the engine cache: True for the default folder, False for none.
        jobs: processes that trace graphs; one per usable core by default.
        progress: called with (what was just done, how many so far, of how many).

    Raises:
        FastvarError: whatever is wrong with checkpoint, size, policy or output; nothing is left half-written.
    """
    if guidance not in GUIDANCE_ROWS:
        raise BuildError(f"guidance {guidance!r} not understood", expected=f"one of {', '.join(GUIDANCE_ROWS)}")
    toolchain = make_toolchain(backend, target, precision, weights, allow_unfused, via)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(Path(checkpoint), image_tokenizer=image_tokenizer, text_encoder=text_encoder)
    family, transformer = checkpoint.family, checkpoint.transformer
    schedule = family.schedule_for(family.size(size, transformer), transformer)
    return build_bundle(
        checkpoint,
        family.plan(schedule, family.policy(policy, schedule, transformer.depth), transformer, sampling_mode),
        Path(out),
        toolchain=toolchain,
        rows=GUIDANCE_ROWS[guidance],
        text_length=text_length,
        with_encoder=with_encoder,
        decoder_tile=decoder_tile,
        sampling=sampling,
        cache=cache,
        jobs=jobs,
        progress=progress,
    )


def build_bundle(
    checkpoint: Checkpoint,
    plan: GenerationPlan,
    out: Path,
    *,
    toolchain: Toolchain | None = None,
    rows: tuple[int, ...] = (2, 1),
    text_length: int | None = None,
    with_encoder: bool = False,
    decoder_tile: int | None = None,
    sampling: SamplingDefaults | None = None,
    cache: EngineCache | Path | bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the bundle of a plan; the arguments are those of `build`, resolved."""
    toolchain = toolchain or make_toolchain()
    check_fit(plan, checkpoint.transformer)
    if checkpoint.tokenizer_file is not None and checkpoint.text_encoder is not None:
        check_tokenizer(checkpoint.tokenizer_file, checkpoint.text_encoder.vocab_size, checkpoint.prompt_format)
    text_length = text_length_of(checkpoint.transformer, text_length)
    if decoder_tile is not None:
        _check_tile(checkpoint, plan, decoder_tile, toolchain)
    assembly = assemble_checkpoint(checkpoint, plan, text_length, rows, with_encoder, decoder_tile)
    sources = engine_weights(checkpoint, with_encoder, toolchain.precision) | preview_weights(checkpoint)
    sources |= edge_weights() if assembly.tiles else {}
    factory = EngineFactory(toolchain, open_cache(cache), sources, jobs)
    with BundleWriter(out) as writer:
        site = Construction(writer, toolchain, factory, progress, total=len(assembly.graphs) + 1)
        engines = site.make_engines(assembly.graphs)
        site.tell("weights")
        weights = _write_weights(writer.path(WEIGHTS), sources, toolchain.precision)
        manifest = _manifest(checkpoint, plan, assembly, engines, weights, text_length, writer, sampling)
        alignment = toolchain.backend.address_alignment
        writer.commit(replace(manifest, precision=toolchain.precision, address_alignment=alignment))
        site.tell("done")
    return site.report(out, assembly, engines, weights)


def _check_tile(checkpoint: Checkpoint, plan: GenerationPlan, rows: int, toolchain: Toolchain) -> None:
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise BuildError(f"decoder tile {rows!r} not understood", expected="a number of latent rows, 1 or more")
    if not adapter_of(checkpoint.transformer).tiles_decoder:
        return  # refused when graphs are put together
    images, grid = checkpoint.image_tokenizer, latent_grid(plan, checkpoint.transformer)
    alignment = toolchain.backend.address_alignment
    for what, size in contiguous_bytes(images, grid, rows, toolchain.precision.compute):
        if size % alignment:
            raise BuildError(
                f"the decoder of this model cannot be tiled for {toolchain.backend.name}: {what} takes {size} bytes",
                expected=f"a multiple of {alignment}, where the library accepts addresses",
                fix="build without --decoder-tile, or with --backend onnxruntime",
            )


def _write_weights(path: Path, sources: Mapping[str, WeightSource], precision: Precision) -> FileRecord:
    sources = quantise_sources(sources, precision)
    dtypes = {name: source.role.stored_dtype(precision) for name, source in sources.items()}
    specs = {name: TensorSpec(name, dtypes[name], source.shape) for name, source in sources.items()}
    return write_weights(path, specs, lambda name: _as_stored(sources[name].fetch(), dtypes[name]))


def _as_stored(tensor: Tensor, dtype: str) -> NDArray[Any]:
    """The tensor's bits as numpy holds them: uint16 for bfloat16, uint8 for float8."""
    converted = tensor.to(getattr(torch, dtype)).contiguous()
    bits = {"bfloat16": torch.uint16, "float8_e4m3fn": torch.uint8}.get(dtype)
    array: NDArray[Any] = (converted if bits is None else converted.view(bits)).numpy()
    return array


def _manifest(
    checkpoint: Checkpoint,
    plan: GenerationPlan,
    assembly: Assembly,
    engines: dict[str, EngineSpec],
    weights: FileRecord,
    text_length: int,
    writer: BundleWriter,
    sampling: SamplingDefaults | None,
) -> Manifest:
    tokenizer = None
    if checkpoint.tokenizer_file is not None:
        tokenizer = writer.add_file(checkpoint.tokenizer_file, "tokenizer.json")
    names = None
    if checkpoint.class_names is not None:
        names = writer.add_file(checkpoint.class_names, CLASS_NAMES)
    return Manifest(
        family=checkpoint.family.name,
        model=checkpoint.name,
        transformer=checkpoint.transformer,
        image_tokenizer=checkpoint.image_tokenizer,
        plan=plan,
        text_length=text_length,
        engines=engines,
        sets=tuple(assembly.sets),
        text_encoder=assembly.text_encoder,
        decoder=assembly.decoder,
        tiles=assembly.tiles,
        encoder=assembly.encoder,
        weights=weights,
        text_tokenizer=tokenizer,
        checkpoint_digest=checkpoint.digest,
        fastvar_version=__version__,
        sampling=sampling or checkpoint.family.sampling,
        class_names=names,
        prompt_format=checkpoint.prompt_format,
    )
