"""Another policy, size or batch for a bundle that is there, without its checkpoint.

Engines hold no weights: the bundle's weight file serves every policy and size of its model, and only engines are
made. Needs no weight to be read, only the names, types and shapes in that file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..core.plan import Batch, GenerationPlan
from ..core.platform import needs_extra
from ..core.policy import PruningPolicy
from ..core.precision import Precision
from ..core.version import __version__
from ..engines.bundle.bundle import Bundle, BundleWriter
from ..engines.bundle.manifest import Manifest
from ..engines.bundle.weight_file import WeightFile
from ..engines.cache.engine_cache import EngineCache
from ..engines.registry import get_backend
from ..engines.spec import EngineSpec
from ..errors import BundleError
from ..families import family_named
from .assembly import Assembly, assemble
from .checkpoints.weight_sources import edge_weights, model_sources
from .construction import BuildReport, Construction, Progress, check_fit, open_cache
from .factory import EngineFactory
from .models.common.quantise import quantise_sources
from .models.common.weights import WeightSource
from .options import batches_of, check_batch
from .toolchain import Toolchain

ENCODER_WEIGHTS = "image_tokenizer.encoder."  # there where the bundle holds the image encoder


@needs_extra("export")
def rebuild(
    bundle: str | Path | Bundle,
    out: str | Path,
    *,
    policy: str | PruningPolicy,
    size: str | None = None,
    batch: tuple[int, ...] | None = None,
    cache: EngineCache | Path | bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build a bundle that differs from another in its pruning policy, and in image size and batch if they are given.

    Precision, backend, target, prompt length, guidance and sampling defaults are those of the other bundle. Its weight
    file is hard-linked where the file system can, else copied. `out` may be the bundle itself.

    Args:
        bundle: folder of the other bundle, every digest of which is checked; or that bundle, opened and so checked.
        out: the new bundle's folder; replaced as a whole when it is complete.
        policy: "dense", "fastvar", a TOML policy file, or a policy.
        size: "WIDTHxHEIGHT" in pixels; the bundle's own by default.
        batch: how many images one pass draws, as for `build`; the bundle's own numbers by default.
        cache: as for `build`.
        jobs: as for `build`.
        progress: as for `build`.

    Raises:
        BundleError: not a bundle, a damaged one, or one whose weights this version names or shapes otherwise.
        BackendError: the bundle's backend is not installed, or in a version that does not run its engines.
        FastvarError: whatever is wrong with size, policy or output; nothing is left half-written.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify="all")
    old, out = source.manifest, Path(out)
    batches = _batches(old, batch)
    plan = _plan(old, policy, size)
    toolchain = _toolchain(old)
    weights = source.weights
    assembly = _assemble(old, plan, batches, with_encoder=_holds_encoder(weights))
    sources = model_sources(old.transformer, {}, old.image_tokenizer, {}, _holds_encoder(weights))
    sources |= edge_weights() if old.tiles else {}
    _check_weights(weights, sources, old.precision)
    factory = EngineFactory(toolchain, open_cache(cache), sources, jobs)
    with BundleWriter(out) as writer:
        copied = _copied_engines(source, assembly, toolchain)
        site = Construction(writer, toolchain, factory, progress, total=len(assembly.graphs) - len(copied) + 1)
        engines = site.make_engines({name: g for name, g in assembly.graphs.items() if name not in copied})
        engines |= {name: _copy(source, spec, writer, toolchain) for name, spec in copied.items()}
        linked = writer.link_file(weights.path, old.weights)
        for record in old.side_files:
            writer.link_file(source.path / record.file, record)
        writer.commit(_manifest(old, plan, assembly, engines))
        site.tell("done")
    report = site.report(out, assembly, engines, old.weights)
    return replace(report, engines_copied=len(copied), weights_linked=linked)


def _plan(old: Manifest, policy: str | PruningPolicy, size: str | None) -> GenerationPlan:
    family, transformer = family_named(old.family), old.transformer
    schedule = old.plan.schedule if size is None else family.schedule_for(family.size(size, transformer), transformer)
    if not isinstance(policy, PruningPolicy):
        policy = family.policy(policy, schedule, transformer.depth)
    plan = family.plan(schedule, policy, transformer, old.plan.sampling_mode)
    check_fit(plan, transformer)
    return plan


def _toolchain(old: Manifest) -> Toolchain:
    """What the bundle was compiled with; engines that were not fused are accepted where it holds some already."""
    backend, target = get_backend(old.backend, target=old.target), old.target
    unfused = any(e.report.kernels > 0 and e.report.fused_attentions < e.attentions for e in old.engines.values())
    resolved = backend.resolve_target(target, old.precision)
    return Toolchain(backend, resolved, old.precision, unfused, backend.graph_form, old.precision_choice)


def _holds_encoder(weights: WeightFile) -> bool:
    return any(name.startswith(ENCODER_WEIGHTS) for name in weights)


def _batches(old: Manifest, batch: tuple[int, ...] | None) -> Sequence[Batch]:
    """The kinds of pass of the new bundle; guidance is as in the other."""
    if batch is None:
        return [own.batch for own in old.sets]
    check_batch(batch)
    return batches_of(batch, tuple(dict.fromkeys(own.rows for own in old.sets)))


def _assemble(old: Manifest, plan: GenerationPlan, batches: Sequence[Batch], with_encoder: bool) -> Assembly:
    """All graphs of the new bundle but the text encoder, whose configuration is not in a manifest."""
    tile = old.tiles.rows if old.tiles else None
    return assemble(plan, old.transformer, old.image_tokenizer, None, old.text_length, batches, with_encoder, tile)


def _check_weights(weights: WeightFile, sources: Mapping[str, WeightSource], precision: Precision) -> None:
    """Every tensor that the new engines are bound to is there, as they take it."""
    for name, source in quantise_sources(sources, precision).items():
        expected = (source.role.stored_dtype(precision), source.shape)
        found = (weights.dtype(name), weights.shape(name)) if name in weights else None
        if found != expected:
            shown = "is missing" if found is None else f"is {found[0]}{list(found[1])}"
            raise BundleError(
                f"{weights.path}: tensor {name!r} {shown}",
                expected=f"{expected[0]}{list(expected[1])}",
                fix="build from the checkpoint: this bundle was made by another version",
            )


def _copied_engines(source: Bundle, assembly: Assembly, toolchain: Toolchain) -> dict[str, EngineSpec]:
    """Engines that know neither policy nor size of the transformer's steps: the text encoder, and the image coders
    where the size stays. They must run with the library that makes the others; not here, if the device is elsewhere.
    """
    old = source.manifest
    coders = [name for name in assembly.graphs if name not in assembly.step_graphs]
    names = [name for name in (old.text_encoder, *coders) if name in old.engines]
    for name in names:
        toolchain.backend.check_library(old.engines[name])
    return {name: old.engines[name] for name in names}


def _copy(source: Bundle, spec: EngineSpec, writer: BundleWriter, toolchain: Toolchain) -> EngineSpec:
    file, sha256, size = writer.add_engine(spec.name, source.read_engine(spec), toolchain.backend.suffix)
    return replace(spec, file=file, sha256=sha256, size_bytes=size)


def _manifest(old: Manifest, plan: GenerationPlan, assembly: Assembly, engines: dict[str, EngineSpec]) -> Manifest:
    return replace(
        old,
        plan=plan,
        engines=engines,
        sets=tuple(assembly.sets),
        decoder=assembly.decoder,
        tiles=assembly.tiles,
        encoder=assembly.encoder,
        fastvar_version=__version__,
    )
