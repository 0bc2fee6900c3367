"""Other weights for a bundle that is there: a fine-tune of its transformer, without building an engine.

Engines hold no weights, so those of the bundle serve every model of its sizes. What follows from the transformer is
made as a build makes it, quantised where the bundle is; all else is taken over as it is stored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from ..core.platform import needs_extra
from ..core.version import __version__
from ..engines.bundle.bundle import Bundle, BundleWriter
from ..engines.bundle.manifest import FileRecord, Manifest
from ..engines.bundle.weight_file import WeightFile, write_weights
from ..engines.spec import TensorSpec
from ..errors import BundleError, CheckpointError, InternalError
from .checkpoints.checkpoint import Loaded, read_transformer
from .checkpoints.parts import find_parts
from .checkpoints.tensor_files import digest, weight_files
from .checkpoints.weight_sources import as_stored, stored_specs
from .construction import BuildReport
from .models.common.quantise import quantise_sources
from .models.common.weights import Sources
from .models.registry import adapter_of
from .models.transformer.adapter import SHARED_PREFIX

REST = "all else: "  # how the line of an origin begins that says where the rest is from
SHOWN_DIGITS = 12  # of a digest in an origin


@needs_extra("export")
def replace_weights(
    bundle: str | Path | Bundle, out: str | Path, *, transformer: str | Path, name: str | None = None
) -> BuildReport:
    """Make a bundle that draws with another transformer of the same sizes: what a build of it would be.

    Engines, image tokenizer and text encoder, sizes, policy and precision are those of the bundle; engines are
    hard-linked where the file system can, else copied. `out` may be the bundle itself.

    Args:
        bundle: folder of the bundle, every digest of which is checked; or that bundle, opened and so checked.
        out: the new bundle's folder; replaced as a whole when it is complete.
        transformer: the other one, as a build takes it: a file of weights, an index, or a folder.
        name: what the model is called; as it is published, or as `transformer`, by default.

    Raises:
        CheckpointError: the transformer cannot be read, or is not of the bundle's sizes.
        NumericsError: a weight is not finite.
        BundleError: not a bundle, a damaged one, or one whose weights this version names or shapes otherwise.
    """
    started = time.perf_counter()
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify="all")
    parts, old, out = find_parts(Path(transformer)), source.manifest, Path(out)
    path = parts.transformer
    loaded = _read(path, old)
    tensors = _Tensors(source.weights, old, loaded.weights)
    with BundleWriter(out) as writer:
        for record in old.files:
            if record != old.weights:
                writer.link_file(source.path / record.file, record)
        weights = write_weights(writer.path(old.weights.file), tensors.specs, tensors.fetch)
        manifest = _manifest(old, weights, path, loaded.nested, name or parts.model or Path(transformer).resolve().stem)
        writer.commit(manifest)
    engines = old.engines.values()
    return BuildReport(
        out=out,
        seconds=time.perf_counter() - started,
        graphs_traced=0,
        graphs_cached=0,
        trace_seconds=0.0,
        compile_seconds=0.0,
        step_engine_bytes=sum(engine.size_bytes for engine in engines if engine.name in _step_engines(old)),
        engine_bytes=sum(engine.size_bytes for engine in engines),
        weight_bytes=weights.size_bytes,
        engines_copied=len(old.engines),
        origin=manifest.origin,
    )


def _read(path: Path, old: Manifest) -> Loaded[Any]:
    """The transformer, which must be of the bundle's sizes."""
    try:
        return read_transformer(path, old.transformer)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} cannot take the place of the transformer of {old.model}: {error.problem}",
            expected=error.expected or f"a transformer of the bundle's family, {old.family}, and of its sizes",
            fix="build a bundle from it, if it is a model of its own",
        ) from error


class _Tensors:
    """The tensors of the new weight file: made of the transformer, or those of the old file."""

    def __init__(self, weights: WeightFile, old: Manifest, state: Mapping[str, Tensor]) -> None:
        self._weights, self._precision = weights, old.precision
        self._state, images = _Noted(state), _Absent()
        sources = adapter_of(old.transformer).weights(old.transformer, self._state, old.image_tokenizer, images)
        self._sources: Sources = quantise_sources(sources, old.precision)
        self.specs = {name: TensorSpec(name, weights.dtype(name), weights.shape(name)) for name in weights}
        self._check()

    def fetch(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored. What the transformer's graphs take from the image tokenizer stays as it is."""
        if name not in self._sources:
            return self._weights[name]
        self._state.read = False
        try:
            return as_stored(self._sources[name].fetch(), self.specs[name].dtype)
        except _NotThereError:
            if self._state.read:
                raise InternalError(f"{name!r} is made of transformer and image tokenizer") from None
            return self._weights[name]

    def _check(self) -> None:
        """The bundle holds what this version makes of such a transformer, and nothing else."""
        made = stored_specs(self._sources, self._precision)
        held = {name: spec for name, spec in self.specs.items() if name.startswith(SHARED_PREFIX)}
        wrong = sorted(name for name in made.keys() | held.keys() if made.get(name) != held.get(name))
        if wrong:
            raise BundleError(
                f"{self._weights.path}: {len(wrong)} tensors are not as this version makes them: {wrong[0]}",
                expected="a bundle of this version",
                fix="build from the checkpoint: this bundle was made by another version",
            )


class _NotThereError(KeyError):
    """A tensor of the image tokenizer was asked for, which is not given anew."""


class _Absent(Mapping[str, Tensor]):
    """The image tokenizer's official tensors: only what was made of them is in a bundle."""

    def __getitem__(self, name: str) -> Tensor:
        raise _NotThereError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Noted(Mapping[str, Tensor]):
    """Tensors, and whether one of them has been read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._held, self.read = state, False

    def __getitem__(self, name: str) -> Tensor:
        self.read = True
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _step_engines(old: Manifest) -> set[str]:
    """Engines of all scales, without text encoder and image coders."""
    coders = {old.text_encoder, old.decoder, old.encoder}
    coders |= {name for stage in (old.tiles.stages if old.tiles else ()) for name in (stage.engine, stage.last)}
    return old.engines.keys() - coders


def _manifest(old: Manifest, weights: FileRecord, path: Path, nested: str, name: str) -> Manifest:
    origin = [f"transformer: {path.name}" + (f" ({nested})" if nested else "")]
    origin += [line for line in old.origin if not line.startswith("transformer: ")]
    if not any(line.startswith(REST) for line in origin):
        origin += [f"{REST}the bundle of {old.model}, checkpoint {old.checkpoint_digest[:SHOWN_DIGITS]}"]
    return replace(
        old,
        model=name,
        weights=replace(weights, file=old.weights.file),
        checkpoint_digest=digest(weight_files(path), json.dumps(["transformer of", old.checkpoint_digest])),
        origin=tuple(origin),
        fastvar_version=__version__,
    )
