"""Ahead-of-time build: checkpoint -> plan -> step graphs -> engines -> bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.plan import GenerationPlan
from ..core.platform import needs_extra
from ..engines.bundle.bundle import BundleWriter
from ..engines.bundle.manifest import FileRecord
from ..engines.cache.engine_cache import EngineCache
from ..engines.registry import BACKEND_NAMES, backend_class
from ..errors import BuildError
from .assembly import latent_grid
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.hub_models import FoundCheckpoint, find_checkpoint
from .checkpoints.published import CLASS_NAMES
from .checkpoints.tokenizer_files import check_tokenizer
from .checkpoints.weight_sources import edge_weights, engine_weights, preview_weights, write_sources
from .construction import WEIGHTS, BuildReport, Construction, Progress, check_fit, kept_in, open_cache
from .describe import assemble_checkpoint, manifest_of, text_length_of
from .factory import EngineFactory
from .models.common.decoder_stages import contiguous_bytes
from .models.registry import adapter_of
from .options import BuildOptions
from .toolchain import Toolchain, make_toolchain, toolchain_of


@needs_extra("export")
def build(
    checkpoint: str | Path | FoundCheckpoint | Checkpoint,
    *,
    out: str | Path,
    options: BuildOptions | None = None,
    cache: EngineCache | Path | bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> BuildReport:
    """Build a bundle.

    Args:
        checkpoint: folder or transformer in an official format; "hub:ORG/NAME" or "hub:ORG/NAME@REVISION" for a
            repository of the Hugging Face hub, whose files are downloaded; or a found or loaded one.
        out: the bundle folder; replaced as a whole when the build is complete.
        options: what the bundle is to be.
        cache: the engine cache: True for the default folder, False for none.
        jobs: processes that trace graphs; one per usable core by default.
        progress: called with (what was just done, how many so far, of how many).
        changes: fields of `BuildOptions` by name, in place of those of `options`.

    Raises:
        FastvarError: whatever is wrong with checkpoint, options or output; nothing is left half-written.
    """
    chosen = (options or BuildOptions()).changed(**changes)
    toolchain = toolchain_of(chosen, kept_in(cache))
    if isinstance(checkpoint, str | Path):
        checkpoint = find_checkpoint(
            checkpoint, model=chosen.model, image_tokenizer=chosen.image_tokenizer, text_encoder=chosen.text_encoder
        )
    if isinstance(checkpoint, FoundCheckpoint):
        checkpoint = checkpoint.load()
    family, transformer = checkpoint.family, checkpoint.transformer
    schedule = family.schedule_for(family.size(chosen.size, transformer), transformer)
    policy = family.policy(chosen.policy, schedule, transformer.depth)
    plan = family.plan(schedule, policy, transformer, chosen.sampling_mode)
    return build_bundle(
        checkpoint, plan, Path(out), chosen, toolchain=toolchain, cache=cache, jobs=jobs, progress=progress
    )


def build_bundle(
    checkpoint: Checkpoint,
    plan: GenerationPlan,
    out: Path,
    options: BuildOptions = BuildOptions(),  # noqa: B008  it is frozen
    *,
    toolchain: Toolchain | None = None,
    cache: EngineCache | Path | bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the bundle of a plan; what the options say of size, policy and compiler, plan and toolchain say instead."""
    toolchain = toolchain or make_toolchain()
    check_fit(plan, checkpoint.transformer)
    if checkpoint.tokenizer_file is not None and checkpoint.text_encoder is not None:
        check_tokenizer(checkpoint.tokenizer_file, checkpoint.text_encoder.vocab_size, checkpoint.prompt_format)
    text_length = text_length_of(checkpoint.transformer, options.text_length)
    if options.decoder_tile is not None:
        _check_tile(checkpoint, plan, options.decoder_tile, toolchain)
    assembly = assemble_checkpoint(checkpoint, plan, options)
    sources = engine_weights(checkpoint, options.with_encoder, toolchain.precision) | preview_weights(checkpoint)
    sources |= edge_weights() if assembly.tiles else {}
    factory = EngineFactory(toolchain, open_cache(cache), sources, jobs)
    with BundleWriter(out) as writer:
        site = Construction(writer, toolchain, factory, progress, total=len(assembly.graphs) + 1)
        engines = site.make_engines(assembly.graphs)
        site.tell("weights")
        written = write_sources(writer.path(WEIGHTS), sources, toolchain.precision)
        manifest = manifest_of(checkpoint, plan, assembly, engines, text_length, toolchain.backend, toolchain.precision)
        manifest = replace(
            manifest,
            precision_choice=toolchain.choice,
            weights=written,
            text_tokenizer=_added(writer, checkpoint.tokenizer_file, "tokenizer.json"),
            class_names=_added(writer, checkpoint.class_names, CLASS_NAMES),
            sampling=options.sampling or manifest.sampling,
        )
        writer.commit(manifest)
        site.tell("done")
    return replace(site.report(out, assembly, engines, written), origin=checkpoint.origin)


def _added(writer: BundleWriter, file: Path | None, name: str) -> FileRecord | None:
    return None if file is None else writer.add_file(file, name)


def _check_tile(checkpoint: Checkpoint, plan: GenerationPlan, rows: int, toolchain: Toolchain) -> None:
    if not adapter_of(checkpoint.transformer).tiles_decoder:
        return  # refused when graphs are put together
    images, grid = checkpoint.image_tokenizer, latent_grid(plan, checkpoint.transformer)
    alignment = toolchain.backend.address_alignment
    for what, size in contiguous_bytes(images, grid, rows, toolchain.precision.compute):
        if size % alignment:
            others = [name for name in BACKEND_NAMES if size % backend_class(name).address_alignment == 0]
            raise BuildError(
                f"the decoder of this model cannot be tiled for {toolchain.backend.name}: {what} takes {size} bytes",
                expected=f"a multiple of {alignment}, where the library accepts addresses",
                fix=f"build without --decoder-tile, or with --backend {' or '.join(others)}",
            )
