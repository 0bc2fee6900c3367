"""A bundle described before it is built: the manifest that a build would write, with nothing traced or compiled.

Every tensor of every engine is known from the step modules' own shapes. What only a compiler can say, the size of an
engine and its scratch memory, is left 0; runtime/memory/layout.py gives a layout for it as for a built one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.plan import GenerationPlan
from ..core.precision import Precision
from ..core.version import __version__
from ..engines.base import Backend
from ..engines.bundle.manifest import FileRecord, Manifest
from ..engines.spec import EngineSpec, TensorSpec
from ..errors import PlanError
from ..families.base import TransformerShape
from .assembly import Assembly, assemble
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.weight_sources import edge_weights, engine_weights
from .models.common.quantise import quantise_sources
from .models.common.rows import Shapes, border_dtype
from .models.common.step_graph import StepGraph
from .models.common.weights import WeightSource
from .options import BuildOptions
from .tracing.onnx import layer_weights, stored_binding


def describe(
    checkpoint: Checkpoint,
    plan: GenerationPlan,
    backend: type[Backend],
    precision: Precision,
    options: BuildOptions = BuildOptions(),  # noqa: B008  it is frozen
) -> Manifest:
    """The manifest of a build with these arguments; digests, sizes and reports are left empty."""
    assembly = assemble_checkpoint(checkpoint, plan, options)
    sources = engine_weights(checkpoint, options.with_encoder, precision) | (edge_weights() if assembly.tiles else {})
    describer = Describer(sources, backend, precision, options.target or "")
    engines = {name: describer.engine(graph) for name, graph in assembly.graphs.items()}
    text_length = text_length_of(checkpoint.transformer, options.text_length)
    return manifest_of(checkpoint, plan, assembly, engines, text_length, backend, precision)


def manifest_of(
    checkpoint: Checkpoint,
    plan: GenerationPlan,
    assembly: Assembly,
    engines: dict[str, EngineSpec],
    text_length: int,
    backend: type[Backend] | Backend,
    precision: Precision,
) -> Manifest:
    """The manifest of a checkpoint's bundle, without what its files alone can say."""
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
        weights=FileRecord("weights.safetensors", "", 0),
        text_tokenizer=None,
        checkpoint_digest=checkpoint.digest,
        fastvar_version=__version__,
        precision=precision,
        address_alignment=backend.address_alignment,
        sampling=checkpoint.family.sampling,
        prompt_format=checkpoint.prompt_format,
        origin=checkpoint.origin,
    )


def text_length_of(config: TransformerShape, wanted: int | None) -> int:
    """The static prompt length in tokens: what is asked for, or the longest that the model reads.

    Raises:
        PlanError: the model reads no prompts, none so long, or always the same number of tokens.
    """
    longest = config.text_length
    if wanted is None or wanted == longest:
        return longest
    if longest == 0:
        raise PlanError("this model reads no prompts", expected="no text length", fix="leave it away")
    if config.first_tokens > 1:
        raise PlanError(
            f"text length {wanted} does not fit this model",
            expected=f"{longest}: prompts are padded to it, and the padding is part of the first scale",
            fix="leave it away",
        )
    if not 2 <= wanted <= longest:
        raise PlanError(f"text length {wanted} is out of range", expected=f"2 to {longest} tokens")
    return wanted


def assemble_checkpoint(checkpoint: Checkpoint, plan: GenerationPlan, options: BuildOptions) -> Assembly:
    """All graphs of a checkpoint's bundle (see `assemble`)."""
    return assemble(
        plan,
        checkpoint.transformer,
        checkpoint.image_tokenizer,
        checkpoint.text_encoder,
        text_length_of(checkpoint.transformer, options.text_length),
        options.batches,
        options.with_encoder,
        options.decoder_tile,
        checkpoint.prefix_length,
    )


class Describer:
    """Describes engines of one backend and precision; `sources` are the weights before quantisation."""

    def __init__(
        self, sources: dict[str, WeightSource], backend: type[Backend], precision: Precision, target: str = ""
    ) -> None:
        self._sources, self._backend, self._precision, self._target = sources, backend, precision, target
        self._stored: Mapping[str, WeightSource] = quantise_sources(sources, precision)

    def engine(self, graph: StepGraph) -> EngineSpec:
        """What a manifest would say of this graph's engine."""
        module: Any = graph.factory(**graph.arguments)
        binding = graph.weight_binding(module)
        binding = stored_binding(binding, layer_weights(self._sources, binding, graph.layer), self._precision)
        weights = tuple(self._weight(name, pattern.format(layer=graph.layer)) for name, pattern in binding.items())
        return EngineSpec(
            name=graph.name,
            file=f"engines/{graph.name}{self._backend.suffix}",
            sha256="",
            size_bytes=0,
            inputs=(*self._tensors(module.input_shapes()), *weights),
            outputs=self._tensors(module.output_shapes()),
            weights=binding,
            backend=self._backend.name,
            target=self._target,
            library_version="",
            attentions=getattr(module, "attentions", 0),
        )

    def _weight(self, name: str, stored: str) -> TensorSpec:
        source = self._stored[stored]
        return TensorSpec(name, source.role.stored_dtype(self._precision), source.shape)

    def _tensors(self, shapes: Shapes) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, border_dtype(name, self._precision), shape) for name, shape in shapes.items())
