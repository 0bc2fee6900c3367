"""Which graphs a plan needs, and which of them each step uses. Graphs that are equal are one graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config import ImageTokenizerConfig, TransformerConfig
from ..engines.manifest import DecoderStage, DecoderTiles, EngineSet, StepEngines
from ..plan import GenerationPlan, StepPlan
from ..schedule import Size
from .block_steps import Attend, Project
from .coders import ImageDecoder, ImageEncoder, TextEncoder
from .decoder_stages import ConvIn, StagePlan, Tiling, decoder_stages
from .graphs import StepGraph
from .steps import Bridge, Condition, TextKV

if TYPE_CHECKING:
    from transformers import T5Config

LAYER_PREFIX = "transformer.blocks.{layer}."
SHARED_PREFIX = "transformer."
DECODER_PREFIX = "image_tokenizer.decoder."


@dataclass
class Assembly:
    """The graphs of a bundle by name, and who uses them."""

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
        self.graphs[graph.name] = graph
        return graph.name


def assemble(
    plan: GenerationPlan,
    transformer: TransformerConfig,
    image_tokenizer: ImageTokenizerConfig,
    text_encoder: T5Config | None,
    text_length: int,
    rows: tuple[int, ...],
    with_encoder: bool = False,
    decoder_tile: int | None = None,
) -> Assembly:
    """All graphs of a bundle: one set of transformer steps for each number of guidance rows, and the coders.

    `decoder_tile`: latent rows that the image decoder holds at a time; None for all of them.
    """
    assembly = Assembly()
    for count in rows:
        assembly.sets.append(_engine_set(assembly, plan, transformer, text_length, count))
    grid = latent_grid(plan, transformer)
    label = _label(grid)
    coder = {"config": image_tokenizer, "grid": grid}
    if decoder_tile is None:
        assembly.decoder = assembly.add(StepGraph(f"decoder-{label}", ImageDecoder, coder, DECODER_PREFIX))
    else:
        assembly.tiles = _tiles(assembly, image_tokenizer, grid, decoder_tile)
    if with_encoder:
        assembly.encoder = assembly.add(StepGraph(f"encoder-{label}", ImageEncoder, coder, "image_tokenizer.encoder."))
    if text_encoder is not None:
        arguments: dict[str, object] = {"config": text_encoder, "text_length": text_length}
        graph = StepGraph(f"text-encoder-t{text_length}", TextEncoder, arguments, "text_encoder.")
        assembly.text_encoder = assembly.add(graph)
    return assembly


def latent_grid(plan: GenerationPlan, transformer: TransformerConfig) -> Size:
    """Rows and columns of what the image decoder reads."""
    height, width = plan.schedule.final
    return height * transformer.patch, width * transformer.patch


def _tiles(assembly: Assembly, config: ImageTokenizerConfig, grid: Size, rows: int) -> DecoderTiles:
    tiling = Tiling(grid[0], rows)
    stages = tuple(_stage(assembly, plan, grid[1], tiling) for plan in decoder_stages(config))
    return DecoderTiles(rows, len(tiling.stripes), stages)


def _stage(assembly: Assembly, plan: StagePlan, latent_width: int, tiling: Tiling) -> DecoderStage:
    prefix = DECODER_PREFIX + "{layer}." if plan.layer else DECODER_PREFIX

    def engine(latent_rows: int) -> str:
        arguments = plan.arguments(latent_rows, latent_width, tiling)
        read, written = plan.channels
        size = _label((latent_rows * plan.scale, latent_width * plan.scale))
        name = f"decoder-{plan.factory.label}-c{read}-c{written}-{size}"
        return assembly.add(StepGraph(name, plan.factory, arguments, prefix, plan.layer))

    if plan.factory is ConvIn:
        whole = engine(tiling.height)
        return DecoderStage(plan.layer, whole, whole)
    return DecoderStage(plan.layer, engine(tiling.stripes[0]), engine(tiling.stripes[-1]))


def _engine_set(
    assembly: Assembly, plan: GenerationPlan, config: TransformerConfig, text_length: int, rows: int
) -> EngineSet:
    text = {"config": config, "rows": rows, "text_length": text_length}
    suffix = f"t{text_length}-r{rows}"
    return EngineSet(
        rows=rows,
        condition=assembly.add(StepGraph(f"condition-{suffix}", Condition, text, SHARED_PREFIX)),
        text_kv=assembly.add(StepGraph(f"text-kv-{suffix}", TextKV, text, LAYER_PREFIX)),
        steps=tuple(_step(assembly, plan, step, config, text_length, rows) for step in plan.steps),
    )


def _step(
    assembly: Assembly, plan: GenerationPlan, step: StepPlan, config: TransformerConfig, text_length: int, rows: int
) -> StepEngines:
    own = step.rows(rows)
    suffix = _rows_label(own, rows)
    shared: dict[str, object] = {"config": config, "rows": own, "text_rows": rows, "size": step.size}

    def project(kept: int) -> str:
        arguments = {**shared, "kept": kept, "position_grid": plan.schedule.position_grid}
        name = f"project-{_label(step.size)}-k{kept}-{suffix}"
        return assembly.add(StepGraph(name, Project, arguments, LAYER_PREFIX))

    def attend(kept: int, pruned: bool) -> str:
        past, fills = step.past(pruned), pruned and step.fills_cache
        guided_past = step.guided_past(pruned) if own < rows else 0
        arguments = {**shared, "kept": kept, "past": past, "text_length": text_length, "fills": fills}
        arguments |= _restoration(plan, step, rows) if kept < step.tokens else {"cached_size": None}
        older = f"of{guided_past}" if guided_past else ""
        extra = ("-fill" if fills else "") + ("-shared" if arguments.get("shared") else "")
        name = f"attend-{_label(step.size)}-k{kept}-s{past + kept}{older}-{suffix}{extra}"
        return assembly.add(StepGraph(name, Attend, {**arguments, "guided_past": guided_past}, LAYER_PREFIX))

    pruned = [plan.policy.prunes(layer) for layer in range(plan.depth)]
    halves: dict[str, str] = {}
    if not all(pruned):
        halves["project"], halves["attend"] = project(step.tokens), attend(step.tokens, False)
    if any(pruned):
        halves["project_pruned"], halves["attend_pruned"] = project(step.kept), attend(step.kept, True)
    return StepEngines(bridge=_bridge(assembly, plan, step, config, rows), **halves)


def _restoration(plan: GenerationPlan, step: StepPlan, rows: int) -> dict[str, object]:
    """What pruned tokens of a step are restored from: the grid of the cached scale, and its guidance rows; and whether
    a layer's sub-layers share one selection.
    """
    filled = next(earlier for earlier in plan.steps if earlier.fills_cache)
    restoration: dict[str, object] = {"cached_size": filled.size, "cached_rows": filled.rows(rows)}
    return restoration | ({"shared": True} if plan.policy.shared_selection else {})


def _bridge(assembly: Assembly, plan: GenerationPlan, step: StepPlan, config: TransformerConfig, rows: int) -> str:
    following = next((later for later in plan.steps if later.index == step.next_index), None)
    own, further = step.rows(rows), following.rows(rows) if following else 0
    arguments = {"rows": own, "text_rows": rows, "size": step.size, "final": plan.schedule.final}
    arguments |= {"next_size": following and following.size, "next_index": step.next_index, "next_rows": further}
    onward = "end" if following is None else f"{_label(following.size)}@{step.next_index}"
    label = _rows_label(own, rows) + (f"to{further}" if following and further < own else "")
    name = f"bridge-{_label(step.size)}-{onward}-of-{_label(plan.schedule.final)}-{label}"
    return assembly.add(StepGraph(name, Bridge, {"config": config, **arguments}, SHARED_PREFIX))


def _rows_label(own: int, rows: int) -> str:
    """r2, or r1of2 where guidance has been switched off."""
    return f"r{own}" if own == rows else f"r{own}of{rows}"


def _label(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
