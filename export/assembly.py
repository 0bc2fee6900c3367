"""The graphs that a plan needs, and those that each step uses. Equal graphs are one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.plan import Batch, GenerationPlan, StepPlan
from ..core.schedule import Size
from ..engines.bundle.manifest import DecoderStage, DecoderTiles, EngineSet, StepEngines
from ..errors import BuildError, InternalError
from ..families.base import ImageTokenizerShape, TransformerShape
from .checkpoints.text_encoders import kind_of
from .models.common.decoder_stages import ConvIn, StagePlan, Tiling, decoder_stages
from .models.common.step_graph import StepGraph
from .models.registry import ADAPTERS, adapter_of
from .models.transformer.adapter import LAYER_PREFIX, SHARED_PREFIX, ExportContext, ModelAdapter, size_label
from .models.transformer.pruning import CROSS_ATTENTION

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DECODER_PREFIX = "image_tokenizer.decoder."

Adapter = ModelAdapter[Any, Any]  # of whichever family, with its own configurations in the context
Context = ExportContext[Any, Any]


@dataclass
class Assembly:
    """The graphs of a bundle by name, and the steps that use them."""

    graphs: dict[str, StepGraph] = field(default_factory=dict)
    sets: list[EngineSet] = field(default_factory=list)
    text_encoder: str = ""  # graph names; no text encoder for a model built without one
    decoder: str = ""  # or else `tiles`
    tiles: DecoderTiles | None = None
    encoder: str = ""  # empty unless asked for

    @property
    def step_graphs(self) -> list[str]:
        """Names of the transformer's graphs: all but the coders."""
        return [name for name, graph in self.graphs.items() if graph.prefix.startswith(SHARED_PREFIX)]

    def add(self, graph: StepGraph) -> str:
        """A graph's name; graphs of one name are one graph."""
        held = self.graphs.setdefault(graph.name, graph)
        if (held.factory, held.arguments) != (graph.factory, graph.arguments):
            raise InternalError(f"two graphs are named {graph.name!r}")
        return graph.name


def assemble(
    plan: GenerationPlan,
    transformer: TransformerShape,
    image_tokenizer: ImageTokenizerShape,
    text_encoder: PretrainedConfig | None,
    text_length: int,
    batches: Sequence[Batch],
    with_encoder: bool = False,
    decoder_tile: int | None = None,
    prefix_length: int = 0,
) -> Assembly:
    """All graphs of a bundle: one set of transformer steps for each kind of pass, and the coders, of one image each.

    `decoder_tile`: latent rows that the image decoder holds at a time; None for all of them. `prefix_length`: tokens of
    what goes before every prompt.

    Raises:
        BuildError: something is asked for that the family does not have.
    """
    adapter = adapter_of(transformer)
    _check_asked(adapter, with_encoder, decoder_tile)
    assembly = Assembly()
    for batch in batches:
        context = ExportContext(plan, transformer, image_tokenizer, text_length, *batch)
        assembly.sets.append(_engine_set(assembly, adapter, context))
    grid = latent_grid(plan, transformer)
    label = size_label(grid)
    coder = {"config": image_tokenizer, "grid": grid}
    if decoder_tile is None:
        assembly.decoder = assembly.add(StepGraph(f"decoder-{label}", adapter.decoder, coder, adapter.decoder_prefix))
    else:
        assembly.tiles = _tiles(assembly, image_tokenizer, grid, decoder_tile)
    if with_encoder and adapter.encoder is not None:
        assembly.encoder = assembly.add(StepGraph(f"encoder-{label}", adapter.encoder, coder, adapter.encoder_prefix))
    if text_encoder is not None:
        arguments: dict[str, object] = {"config": text_encoder, "text_length": text_length}
        arguments |= {"prefix_length": prefix_length} if kind_of(text_encoder).has_prefix else {}
        name = f"text-encoder-t{text_length}" + (f"-p{prefix_length}" if prefix_length else "")
        assembly.text_encoder = assembly.add(StepGraph(name, kind_of(text_encoder).step, arguments, "text_encoder."))
    return assembly


def _check_asked(adapter: Adapter, with_encoder: bool, decoder_tile: int | None) -> None:
    name = adapter.family.name
    if with_encoder and adapter.encoder is None:
        having = [other for other, its in ADAPTERS.items() if its.encoder is not None]
        raise BuildError(
            f"{name} bundles hold no image encoder: only those of {', '.join(having)} can upscale and in-paint",
            expected="a build without --with-encoder",
        )
    if decoder_tile is not None and not adapter.tiles_decoder:
        raise BuildError(
            f"the image decoder of {name} models cannot run in stripes: it attends over the whole image",
            expected="a build without --decoder-tile",
        )


def latent_grid(plan: GenerationPlan, transformer: TransformerShape) -> Size:
    """Rows and columns of the latent that the image decoder reads."""
    height, width = plan.schedule.final
    return height * transformer.patch, width * transformer.patch


def _tiles(assembly: Assembly, config: ImageTokenizerShape, grid: Size, rows: int) -> DecoderTiles:
    tiling = Tiling(grid[0], rows)
    stages = tuple(_stage(assembly, plan, grid[1], tiling) for plan in decoder_stages(config))
    return DecoderTiles(rows, len(tiling.stripes), stages)


def _stage(assembly: Assembly, plan: StagePlan, latent_width: int, tiling: Tiling) -> DecoderStage:
    prefix = DECODER_PREFIX + "{layer}." if plan.layer else DECODER_PREFIX

    def engine(latent_rows: int) -> str:
        arguments = plan.arguments(latent_rows, latent_width, tiling)
        read, written = plan.channels
        size = size_label((latent_rows * plan.scale, latent_width * plan.scale))
        name = f"decoder-{plan.factory.label}-c{read}-c{written}-{size}"
        return assembly.add(StepGraph(name, plan.factory, arguments, prefix, plan.layer))

    if plan.factory is ConvIn:
        whole = engine(tiling.height)
        return DecoderStage(plan.layer, whole, whole)
    return DecoderStage(plan.layer, engine(tiling.stripes[0]), engine(tiling.stripes[-1]))


def _engine_set(assembly: Assembly, adapter: Adapter, context: Context) -> EngineSet:
    layer_conditioning = adapter.layer_conditioning(context)
    return EngineSet(
        rows=context.guidance_rows,
        images=context.images,
        conditioning=assembly.add(adapter.conditioning(context)),
        layer_conditioning=assembly.add(layer_conditioning) if layer_conditioning is not None else "",
        steps=tuple(_step(assembly, adapter, context, step) for step in context.plan.steps),
    )


def _step(assembly: Assembly, adapter: Adapter, context: Context, step: StepPlan) -> StepEngines:
    plan, rows, own = context.plan, context.rows, context.rows_of(step)
    grid, suffix = adapter.grid(context, step), context.rows_label(step)
    label = size_label(grid) + ("" if step.part is None else f"-part{step.part}")
    shared: dict[str, object] = {"config": context.transformer, "rows": own, "text_rows": rows, "size": grid}

    def qkv(kept: int) -> str:
        arguments = {**shared, "kept": kept, **adapter.qkv_arguments(context, step)}
        name = f"qkv-{label}-k{kept}-{suffix}" + (context.of_images if "images" in arguments else "")
        return assembly.add(StepGraph(name, adapter.qkv, arguments, LAYER_PREFIX))

    def attn_mlp(kept: int, pruned: bool) -> str:
        past, fills = step.past(pruned), pruned and step.writes_restore_cache
        guided_past = step.guided_past(pruned) if own < rows else 0
        arguments = {**shared, "kept": kept, "past": past, "fills": fills, "guided_past": guided_past}
        arguments |= _restoration(context, step) if kept < step.tokens else {"cached_size": None}
        arguments |= adapter.attn_mlp_arguments(context, step)
        older = f"of{guided_past}" if guided_past else ""
        extra = ("-fill" if fills else "") + ("-shared" if arguments.get("shared") else "")
        extra += "-textless" if arguments.get("restored") else ""
        name = f"attn_mlp-{label}-k{kept}-s{past + kept}{older}-{suffix}{extra}"
        return assembly.add(StepGraph(name, adapter.attn_mlp, arguments, LAYER_PREFIX))

    pruned = [plan.policy.prunes(layer) for layer in range(plan.depth)]
    names: dict[str, str] = {}
    if not all(pruned):
        names["qkv"], names["attn_mlp"] = qkv(step.tokens), attn_mlp(step.tokens, False)
    if any(pruned):
        names["qkv_pruned"], names["attn_mlp_pruned"] = qkv(step.kept), attn_mlp(step.kept, True)
    for kind in ("pick", "residual"):
        graph: StepGraph | None = getattr(adapter, kind)(context, step)
        if graph is not None:
            names[kind] = assembly.add(graph)
    return StepEngines(sampling_head=assembly.add(adapter.sampling_head(context, step)), **names)


def _restoration(context: Context, step: StepPlan) -> dict[str, object]:
    """The grid and the rows of the restore scale, whether a layer's sub-layers share one selection, and which of them
    are restored whole."""
    filled = next(step for step in context.plan.steps if step.writes_restore_cache)
    restoration: dict[str, object] = {"cached_size": filled.size, "cached_rows": context.rows_of(filled)}
    restoration |= {"shared": True} if context.plan.policy.shared_selection else {}
    return restoration | ({} if step.text else {"restored": (CROSS_ATTENTION,)})
