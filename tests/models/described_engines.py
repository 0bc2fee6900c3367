"""Engines described from the step modules' own shapes: a manifest as a build would write it, with nothing traced."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastvar.core.plan import Batch, GenerationPlan
from fastvar.core.precision import Precision
from fastvar.engines.bundle.manifest import FileRecord, Manifest
from fastvar.engines.spec import EngineSpec, TensorSpec
from fastvar.export.assembly import assemble
from fastvar.export.models.common.rows import border_dtype
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.infinity.steps import InfinityImageDecoder
from fastvar.families.infinity import ImageTokenizerConfig, TransformerConfig

TEXT_LENGTH = 3


def model(depth: int, patchify: bool = False) -> TransformerConfig:
    return TransformerConfig(
        depth=depth,
        width=8,
        heads=2,
        mlp_width=16,
        text_width=128,
        text_length=TEXT_LENGTH,
        code_channels=8,
        spatial_patchify=patchify,
    )


def manifest_for(
    plan: GenerationPlan,
    config: TransformerConfig,
    text_length: int = TEXT_LENGTH,
    images: ImageTokenizerConfig | None = None,
    decoder_tile: int | None = None,
) -> Manifest:
    """A manifest as a build would write it, but for the files."""
    images = images or ImageTokenizerConfig(bits=config.bits, base_channels=24)
    assembly = assemble(plan, config, images, None, text_length, [Batch(2), Batch(1)], decoder_tile=decoder_tile)
    engines = {
        name: step_engine(graph) for name, graph in assembly.graphs.items() if graph.factory != InfinityImageDecoder
    }
    grid = tuple(n * config.patch for n in plan.schedule.final)
    pixels = tuple(n * images.patch_size for n in grid)
    if assembly.tiles is None:
        decoder = {"summed": (1, config.bits, *grid)}, {"image": (1, 3, *pixels)}
        engines[assembly.decoder] = engine_spec(assembly.decoder, *decoder, {"conv": "image_tokenizer.decoder.conv"})
    encoder = {"image": (1, 3, *pixels)}, {"latent": (1, config.bits, *grid)}
    engines["encoder"] = engine_spec("encoder", *encoder, {"conv_in": "image_tokenizer.encoder.conv_in"})
    ids = dict.fromkeys(("ids", "attention_mask"), (1, text_length))
    engines["text-encoder"] = engine_spec("text-encoder", ids, {"features": (text_length, config.text_width)}, {})
    return Manifest(
        family="infinity",
        model="described",
        transformer=config,
        image_tokenizer=images,
        plan=plan,
        text_length=text_length,
        engines=engines,
        sets=tuple(assembly.sets),
        text_encoder="text-encoder",
        decoder=assembly.decoder,
        encoder="encoder",
        tiles=assembly.tiles,
        weights=FileRecord("weights.safetensors", "", 0),
        text_tokenizer=None,
        checkpoint_digest="",
        fastvar_version="",
    )


def step_engine(graph: StepGraph) -> EngineSpec:
    inputs, outputs, weights = step_border(graph.factory, tuple(graph.arguments.items()))
    return engine_spec(graph.name, inputs, outputs, {name: graph.prefix + name for name in weights})


@cache
def step_border(factory: type, arguments: tuple[tuple[str, Any], ...]) -> tuple[dict, dict, tuple[str, ...]]:
    """Shapes of a step's inputs and outputs, and the names of its weights."""
    module = factory(**dict(arguments))
    return module.input_shapes(), module.output_shapes(), module.weights


def engine_spec(name: str, inputs: dict, outputs: dict, weights: dict[str, str]) -> EngineSpec:
    def specs(shapes: dict[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, border_dtype(n, Precision()), s) for n, s in shapes.items())

    weighted = specs({**inputs, **dict.fromkeys(weights, (1,))})
    return EngineSpec(name, f"engines/{name}", "", 0, weighted, specs(outputs), weights, "described", "cpu", "1")
