"""Engines described from the step modules' own shapes: a manifest as a build would write it, with nothing traced."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastvar.config import ImageTokenizerConfig, TransformerConfig
from fastvar.engines.manifest import EngineSpec, FileRecord, Manifest, TensorSpec
from fastvar.export.assembly import assemble
from fastvar.export.block_steps import Attend, Project
from fastvar.export.coders import ImageDecoder
from fastvar.export.decoder_stages import ConvOut, ShortcutFirstConv, Stage, UpsampleConv
from fastvar.export.graphs import StepGraph
from fastvar.export.image_tokenizer import norm_groups
from fastvar.export.rows import INTEGERS, tokens_of
from fastvar.export.steps import Bridge, Condition, TextKV
from fastvar.plan import GenerationPlan

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
    assembly = assemble(plan, config, images, None, text_length, (2, 1), decoder_tile=decoder_tile)
    engines = {name: step_engine(graph) for name, graph in assembly.graphs.items() if graph.factory != ImageDecoder}
    if assembly.tiles is None:
        grid = tuple(n * config.patch for n in plan.schedule.final)
        pixels = tuple(n * images.patch_size for n in grid)
        decoder = {"summed": (1, config.bits, *grid)}, {"image": (1, 3, *pixels)}
        engines[assembly.decoder] = engine_spec(assembly.decoder, *decoder, {"conv": "image_tokenizer.decoder.conv"})
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
    return module.input_shapes(), output_shapes(module), module.weights


def output_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """What the modules' docstrings promise."""
    if isinstance(module, Stage):
        return stage_shapes(module)
    c, R = module.config, module.rows
    if isinstance(module, Condition | TextKV):
        T = module.text_length
        found = {
            "x": (R, c.width),
            "text": (T * R, c.width),
            "modulation": (R, 6, c.width),
            "head_modulation": (R, 2, c.width),
            "text_bias": (R * c.heads, 1, T),
            **dict.fromkeys(("text_keys", "text_values"), (T, R * c.heads, c.head_dim)),
        }
    elif isinstance(module, Project):
        found = dict.fromkeys(("q", "keys", "values"), (module.kept, R * c.heads, c.head_dim))
        found["kept"] = (module.kept * R,)
    elif isinstance(module, Attend):
        whole = (tokens_of(module.size) * R, c.width)
        found = dict.fromkeys(("x_out", "cache_sa", "cache_ca", "cache_ffn"), whole)
        found |= dict.fromkeys(("kept_ca", "kept_ffn"), (module.kept * R,))
    else:
        assert isinstance(module, Bridge)
        found = {
            "logits": (tokens_of(module.size), 2 * c.code_channels),
            "summed_out": module.input_shapes()["summed"],
            "x_next": (tokens_of(module.next_size or (0, 0)) * R, c.width),
        }
    return {name: found[name] for name in module.outputs}


def stage_shapes(stage: Stage) -> dict[str, tuple[int, ...]]:
    channels, rows, width = stage.channels[1], stage.rows, stage.width
    statistics = (2, norm_groups(channels)) if not isinstance(stage, ConvOut) else ()
    if "summed" in stage.inputs:
        statistics = (len(stage.tiling.stripes), *statistics)
    if isinstance(stage, UpsampleConv):
        rows, width = 2 * rows, 2 * width
    if isinstance(stage, ShortcutFirstConv):
        channels *= 2
    return {name: statistics if name == "statistics_out" else (rows, channels, width) for name in stage.outputs}


def engine_spec(name: str, inputs: dict, outputs: dict, weights: dict[str, str]) -> EngineSpec:
    integers = INTEGERS | {"kept_ca", "kept_ffn"}

    def specs(shapes: dict[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, "int64" if n in integers else "float32", s) for n, s in shapes.items())

    weighted = specs({**inputs, **dict.fromkeys(weights, (1,))})
    return EngineSpec(name, f"engines/{name}", "", 0, weighted, specs(outputs), weights, "described", "cpu", "1")
